"""A frozen base model: whole images in, targets out.

Works on any timm model whose last block calls one scaled dot-product attention: the queries, keys and
bias are taken from that very call, so they are what enters the softmax whatever the class does before
it (query/key norms, rotary embedding, relative position bias, registers). The attention itself stays
fused; only the few rows that are targets are computed a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from tec_cache.base.source import Given
from tec_cache.device import Compute
from tec_cache.errors import ConfigError
from tec_cache.printable import counted
from tec_cache.targets import attention_rows
from tec_cache.types import Rows, Targets, TargetSpec

# Classes whose tokens are laid out as (prefix, patches row by row) and whose blocks each return the
# residual stream. Others (hierarchical, windowed, NaFlex) are refused by name.
KNOWN_CLASSES = ("VisionTransformer", "VisionTransformerDistilled", "VisionTransformerRelPos", "Eva", "Beit")


class _AttentionCall(TorchFunctionMode):
    """Remembers the arguments of every scaled_dot_product_attention made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.calls.append((args[0], args[1], mask, kwargs.get("scale")))
        return func(*args, **kwargs)


class FrozenBase(nn.Module):
    """A base model that gives raw targets; see `load_base` for how one is made.

    images: (B, 3, S, S) float, S = `input_size`, already normalized with `mean` and `std`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        identity: Mapping[str, Any],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        last_layers: int = 2,
        k: Rows = 15,
        class_target: bool = False,
        facts: Sequence[tuple[str, str, str]] = (),
        given: Given | None = None,
    ) -> None:
        super().__init__()
        check_supported(model)
        parts: Any = model
        depth = len(parts.blocks)
        if not 1 <= last_layers <= depth:
            raise ConfigError(
                f"the mean of the last {counted(last_layers, 'block')} was asked for, {name} has {depth}",
                todo=f"give --last-layers from 1 to {depth}",
            )
        self.model = model.eval().requires_grad_(False)
        self.name, self.identity = name, dict(identity)
        self.mean, self.std = mean, std
        self.last_layers, self.k, self.class_target = last_layers, k, class_target
        self.facts = tuple(facts)
        """(name, value, who says so) of all that no shape shows: see `facts.settle`."""
        self.given = given or Given()
        self.num_prefix = int(parts.num_prefix_tokens)
        self.has_class_token = parts.cls_token is not None
        self.grid = int(parts.patch_embed.grid_size[0])
        self.input_size = int(parts.patch_embed.img_size[0])
        self.channels = int(parts.embed_dim)
        self.num_heads = int(parts.blocks[-1].attn.num_heads)
        self.num_calls = 0
        self._compute: Compute | None = None
        num_tokens = self.grid * self.grid
        if isinstance(k, int) and not 0 <= k <= num_tokens:
            raise ConfigError(
                f"{counted(k, 'attention row')} from {counted(num_tokens, 'patch')}",
                todo=f"give --k from 0 to {num_tokens}",
            )
        module: Any
        for module in model.modules():
            # TIMM_FUSED_ATTN=0 would hide the call that the rows are taken from
            if hasattr(module, "fused_attn"):
                module.fused_attn = True

    @property
    def first_row(self) -> str:
        """Say whose attention row 0 is."""
        return "class token" if self.has_class_token else "mean query of the patches: the base has no class token"

    def train(self, mode: bool = True) -> FrozenBase:
        """Stay in evaluation mode, whatever the module around it does."""
        return super().train(False)

    def prepare(self, compute: Compute) -> FrozenBase:
        """Move to where it will compute; in bfloat16 cast once what autocast would cast again in every forward.

        Autocast keeps no casts of weights that need no gradient. Cast are the weights and biases of linear layers and
        of the patch embedding; layer norms, scales and embeddings stay float32, as they do under autocast, and the
        same bits come out. From then on it computes under that autocast, whatever its caller does.
        """
        self.to(compute.device)
        self._compute = compute
        if compute.precision == "bfloat16":
            for module in self.model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(torch.bfloat16)
        return self

    def spec(self, normalization: Any) -> TargetSpec:
        """Return what its targets consist of once normalized."""
        heads = 0 if self.k is None else self.num_heads
        return TargetSpec(
            grid=self.grid,
            channels=self.channels,
            num_heads=heads,
            k=self.k,
            normalization=normalization,
            class_token=self.class_target,
        )

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> Targets:
        """Return raw features (B, L, C), attention logits (B, H, k+1, L), rows (B, k) and, if asked for, class tokens.

        Features are the mean of the outputs of the last `last_layers` blocks, patch tokens only, before the
        final LayerNorm (method: "Feature target"). Logits are those of the last block. A class token (B, C) is the last
        block's output there, before that LayerNorm too; the mean over the patches for a base that has none.
        """
        if images.shape[-2:] != (self.input_size, self.input_size):
            raise ConfigError(
                f"images of {tuple(images.shape[-2:])} were given to a base that takes {self.input_size} pixels",
                where=self.name,
            )
        self.num_calls += 1
        outputs: list[torch.Tensor] = []
        call = _AttentionCall()
        blocks: Any = self.model.blocks
        attention = blocks[-1].attn
        inner: Callable[..., torch.Tensor] = attention.forward

        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            with call:
                return inner(*args, **kwargs)

        hooks = [
            block.register_forward_hook(lambda _m, _i, out: outputs.append(out))
            for block in list(blocks)[-self.last_layers :]
        ]
        if self.k is not None:
            attention.forward = watched
        try:
            with self._compute.autocast() if self._compute else nullcontext():
                self.model.forward_features(images)  # type: ignore[operator]
        finally:
            for hook in hooks:
                hook.remove()
            if self.k is not None:
                del attention.forward
        features = torch.stack([out[:, self.num_prefix :].float() for out in outputs]).mean(dim=0)
        token = self._token(outputs[-1].float()) if self.class_target else None
        if self.k is None:
            return Targets(features, class_token=token)
        if len(call.calls) != 1:
            raise ConfigError(
                f"the last block of {self.name} makes {counted(len(call.calls), 'attention call')} where one is known",
                todo="use --k none, or a base with plain attention",
            )
        query, key, bias, scale = call.calls[0]
        logits, rows = attention_rows(
            query,
            key,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            num_prefix=self.num_prefix,
            has_class_token=self.has_class_token,
            k=self.k,
            bias=bias,
        )
        return Targets(features, logits, rows, token)

    def _token(self, last: torch.Tensor) -> torch.Tensor:
        """Return the class token (B, C) of a block's output (B, prefix + L, C), or the patches' mean."""
        return last[:, 0] if self.has_class_token else last[:, self.num_prefix :].mean(dim=1)


def check_supported(model: nn.Module) -> None:
    """Raise ConfigError, naming the class, where the tokens of `model` cannot be taken as described."""
    kind = type(model).__name__
    if kind not in KNOWN_CLASSES:
        raise ConfigError(
            f"a base of class {kind} is not supported",
            todo=f"use a plain vision transformer of timm; classes that work: {', '.join(KNOWN_CLASSES)}",
        )
    parts: Any = model
    # a convolutional stem (hybrid) has no patch size; parallel blocks have no single attention
    embed, block = type(parts.patch_embed).__name__, parts.blocks[-1]
    if embed != "PatchEmbed":
        raise ConfigError(f"a base with {embed} in the place of plain patches is not supported", where=kind)
    if not hasattr(block, "attn"):
        raise ConfigError(f"a base with blocks of class {type(block).__name__} is not supported", where=kind)
    rows, columns = parts.patch_embed.grid_size
    if rows != columns:
        raise ConfigError(f"a base with a grid of {rows} x {columns} patches is not supported", where=kind)
