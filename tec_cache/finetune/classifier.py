"""An encoder that was loaded, and the classifiers on one: how they read it, and what of them stays frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from tec_cache.finetune.recipes import Rule, Tune
from tec_cache.student.adapters import EncoderAdapters, Mlp

EPS = 1e-6
"""Of a new norm before a classifier."""


@dataclass(frozen=True)
class LoadedEncoder:
    """A pretrained encoder on the CPU, and what lies beside it; nothing of it is changed here."""

    model: VisionTransformer
    """Created with num_classes=0 for the images' size; its class token is T' where it had an input adapter."""
    architecture: str
    """timm's name, without tag."""
    model_args: Mapping[str, Any]
    """Arguments that make `model` of it, without img_size."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_adapter_state: Mapping[str, Tensor] | None = None
    """`class_token`: T (1, 1, C), and the weights of its MLP."""
    adapters_states: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Weights of `student.adapters.EncoderAdapters`, by the target set; "" where it had one, or one for all."""
    made_of: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: name, weights' hash; for an export its "export", as config.json has it."""

    @property
    def input_size(self) -> int:
        """Edge of the images in pixels."""
        return int(self.model.patch_embed.img_size[0])  # type: ignore[index]


class Classifier(nn.Module):
    """Images (B, 3, S, S), normalized with `mean` and `std`, to logits (B, num_classes).

    `vit` is timm's own module. With an input adapter its class token is T, and T' = MLP(T) takes the place of it in
    every pass. Frozen parts ask for no gradient and stay in evaluation mode.
    """

    def __init__(self, source: LoadedEncoder, vit: VisionTransformer, num_classes: int, tune: Tune, rule: Rule) -> None:
        super().__init__()
        self.tune, self.rule, self.num_classes = tune, rule, num_classes
        self.mean, self.std, self.input_size = source.mean, source.std, source.input_size
        self.vit: Any = vit
        self.input_adapter: Mlp | None = None
        self.encoder_adapters: EncoderAdapters | None = None

    @property
    def class_token(self) -> Tensor:
        """The class token that enters the blocks, (1, 1, C)."""
        token: Tensor = self.vit.cls_token
        return token if self.input_adapter is None else self.input_adapter(token)

    def run(self, images: Tensor) -> Tensor:
        """Call `vit` with the class token that enters the blocks."""
        swapped = {} if self.input_adapter is None else {"cls_token": self.class_token}
        out: Tensor = functional_call(self.vit, swapped, (images,))
        return out


class FullClassifier(Classifier):
    """Everything is trained: patch tokens' mean, a new LayerNorm, a Linear, all of them in `vit`."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.run(images)


class FrozenClassifier(Classifier):
    """The encoder is frozen, its final norm included; a BatchNorm without weights precedes the Linear.

    The classifier reads the class token by MAE's rule. By this project's it reads the mean of the patch tokens: of Z_e
    where there are encoder adapters, else of the encoder's output.
    """

    def __init__(self, source: LoadedEncoder, vit: VisionTransformer, num_classes: int, tune: Tune, rule: Rule) -> None:
        super().__init__(source, vit, num_classes, tune, rule)
        vit.reset_classifier(0, "")  # all tokens come out, after the pretrained norm
        vit.requires_grad_(False)
        self.norm = nn.BatchNorm1d(vit.embed_dim, affine=False, eps=EPS)
        self.head = nn.Linear(vit.embed_dim, num_classes)
        self.train()

    def train(self, mode: bool = True) -> FrozenClassifier:
        """Set the mode of what is trained; the encoder stays in evaluation mode."""
        super().train(mode)
        self.vit.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Return what the classifier reads, (B, C)."""
        if self.input_adapter is None and self.encoder_adapters is None:
            with torch.no_grad():
                tokens = self.tokens(images)
        else:
            tokens = self.tokens(images)
        return tokens[:, 0] if self.rule == "mae" else tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)

    def tokens(self, images: Tensor) -> Tensor:
        """Return the encoder's output after its final norm, or Z_e, (B, prefix + L, C)."""
        if self.encoder_adapters is None:
            return self.run(images)
        layers: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda _m, _i, out: layers.append(out)) for block in self.vit.blocks]
        try:
            last = self.run(images)
        finally:
            for hook in hooks:
                hook.remove()
        out: Tensor = self.encoder_adapters([*layers[:-1], last])
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        out: Tensor = self.head(self.norm(self.features(images)))
        return out
