"""The student: a timm ViT that sees a quarter of the patches, between adapters and a decoder."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from timm.layers import Attention, DropPath, LayerScale, PatchDropout, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tec_cache.errors import ConfigError, nearest
from tec_cache.model_args import check_model_args
from tec_cache.recipes import decoder_shape
from tec_cache.student.adapters import EncoderAdapters, Mlp
from tec_cache.student.blocks import draws, run_block
from tec_cache.student.decoder import Decoder
from tec_cache.student.losses import attention_loss, feature_loss
from tec_cache.student.masking import Mask, num_visible_patches, random_mask
from tec_cache.student.position import sincos_position
from tec_cache.targets import narrow_rows
from tec_cache.types import Targets, TargetSpec

Adapters = Literal["both", "input", "encoder", "none"]


class Student(nn.Module):
    """Encoder, adapters and decoder for targets of one `TargetSpec`; see `create_student`.

    The encoder is timm's own module, so its weights leave as a timm checkpoint.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        targets: TargetSpec,
        *,
        adapters: Adapters = "both",
        mask_ratio: float = 0.75,
        tau: float = 1.0,
        decoder_depth: int = 2,
        decoder_width: int | None = None,
        decoder_heads: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_encoder(encoder, targets.grid)
        if adapters not in ("both", "input", "encoder", "none"):
            raise ConfigError(f"unknown adapters {adapters!r}", todo="one of: both, input, encoder, none")
        if not 0 < num_visible_patches(targets.num_tokens, mask_ratio) < targets.num_tokens:
            raise ConfigError(
                f"mask ratio {mask_ratio} of {targets.num_tokens} patches leaves none visible or none masked",
                todo="give a --mask-ratio between, such as 0.75",
            )
        if tau <= 0:
            raise ConfigError(f"tau {tau}", todo="give a --tau above 0")
        width, heads = decoder_shape(encoder.embed_dim)
        width = width if decoder_width is None else decoder_width
        heads = heads if decoder_heads is None else decoder_heads
        if width < 1 or heads < 1 or width % heads:
            raise ConfigError(
                f"a decoder of width {width} with {heads} heads", todo="use a width that the heads divide"
            )
        channel, depth = encoder.embed_dim, len(encoder.blocks)
        self.targets, self.mask_ratio, self.tau = targets, mask_ratio, tau
        self.checkpointing, self.draws = checkpointing, draws(encoder.blocks)
        self.encoder: Any = encoder  # timm types its optional tokens as None or Parameter
        self.input_adapter = Mlp(channel, 4 * channel) if adapters in ("both", "input") else None
        self.encoder_adapters = EncoderAdapters(depth, channel, 4 * width) if adapters in ("both", "encoder") else None
        self.decoder = Decoder(
            grid=targets.grid,
            encoder_width=channel,
            width=width,
            depth=decoder_depth,
            heads=heads,
            channels=targets.channels,
            attention_heads=targets.num_heads if targets.k is not None else 0,
            checkpointing=checkpointing,
        )
        if targets.k is not None and targets.channels % targets.num_heads:
            raise ConfigError(f"{targets.channels} channels do not divide among {targets.num_heads} heads")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as MAE does: xavier-uniform linears with zero bias, tokens normal(0, 0.02), fixed positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.encoder.patch_embed.proj
        # a convolution's fan would count the kernel's positions as outputs; the flattened kernel is the Linear it is
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        for branch in (self.decoder.feature, self.decoder.attention):
            if branch is not None:
                nn.init.normal_(branch.mask_token, std=0.02)
        with torch.no_grad():
            self.encoder.pos_embed.copy_(sincos_position(self.encoder.embed_dim, self.targets.grid))
        self.encoder.pos_embed.requires_grad_(False)

    def class_token(self) -> torch.Tensor:
        """Return the class token that enters the encoder, (1, 1, C): T' = MLP(T) with an input adapter, else T."""
        token: torch.Tensor = self.encoder.cls_token
        return token if self.input_adapter is None else self.input_adapter(token)

    def forward_encoder(self, images: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Encode the visible patches and fuse the layers: Z_e (M B, 1 + V, C).

        images: (B, 3, S, S) float, normalized; mask: of M B rows, row m B + i is a mask of image i.
        """
        position = self.encoder.pos_embed
        x = self.embed_visible(images, mask) + position[0, 1:][mask.visible]
        first = (self.class_token() + position[:, :1]).to(x.dtype).expand(x.shape[0], -1, -1)
        x = torch.cat([first, x], dim=1)
        layers = []
        for block in self.encoder.blocks:
            x = run_block(block, x, self.checkpointing, draws=self.draws)
            layers.append(x)
        layers[-1] = self.encoder.norm(x)
        if self.encoder_adapters is None:
            return layers[-1]
        out: torch.Tensor = self.encoder_adapters(layers)
        return out

    def embed_visible(self, images: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Embed the visible patches alone: (M B, V, C). The convolution of timm's patch embedding is a Linear.

        Three quarters of that convolution, forward and backward, would be thrown away: 2 % of a ViT-B's step.
        """
        grid, embed = self.targets.grid, self.encoder.patch_embed
        batch, colours, size, _ = images.shape
        patches = images.view(batch, colours, grid, size // grid, grid, size // grid).permute(0, 2, 4, 1, 3, 5)
        view = torch.arange(len(mask.order), device=images.device)[:, None] % batch
        seen = patches[view, mask.visible // grid, mask.visible % grid].flatten(2)
        x: torch.Tensor = embed.norm(nn.functional.linear(seen, embed.proj.weight.flatten(1), embed.proj.bias))
        return x

    def forward(self, images: torch.Tensor, targets: Targets, *, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the losses {"feature": ..., "attention": ...}, scalars float32.

        images: (B, 3, S, S) normalized. targets: normalized features (B, L, C) and attention rows, from the
        cache, from the base online, or pixels. noise: (M B, L), decides the masks, M of each view: row m B + i is
        mask m of view i. Without an attention target there is no "attention".
        """
        targets = narrow_rows(targets, self.targets.k)
        mask = random_mask(noise, self.mask_ratio)
        encoded = self.forward_encoder(images, mask)
        rows = None if targets.rows is None else targets.rows.repeat(len(noise) // len(images), 1)
        features, logits = self.decoder(encoded, mask, rows)
        losses = {"feature": feature_loss(features, targets.features, mask)}
        if logits is not None and targets.attention is not None:
            losses["attention"] = attention_loss(logits, targets.attention, self.tau)
        return losses


def create_student(
    name: str = "vit_base_patch16_224",
    *,
    targets: TargetSpec,
    model_args: dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Student:
    """Create a randomly initialized student for targets of the given spec.

    name, model_args: a plain vision transformer of timm and arguments that change it (`patch_size`,
    `embed_dim`, `depth`, ...); its input becomes targets.grid * patch pixels. options: those of `Student`.
    The weights are a function of `seed` and leave torch's generator as it was. Raises ConfigError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Student(create_encoder(name, targets.grid, model_args), targets, **options)


def create_encoder(name: str, grid: int, model_args: dict[str, Any] | None = None) -> VisionTransformer:
    """Create a timm model whose input is grid * patch pixels."""
    args = check_model_args(model_args or {}, f"the student {name}")
    for given, why in (("img_size", "input size follows from grid and patch"), ("num_classes", "head is its decoder")):
        if given in args:
            raise ConfigError(f"the student's {why}", todo=f"leave out {given}")
    if not timm.is_model(name):
        near = nearest(name, timm.list_models("vit*"))
        raise ConfigError(f"timm {timm.__version__} knows no model {name!r}{near}", todo="see timm.list_models('vit*')")
    try:
        probe = timm.create_model(name, num_classes=0, **args)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"timm cannot create {name} with {args}: {error}", todo="check --student-arg") from error
    check_class(probe, name)
    edge = grid * int(probe.patch_embed.patch_size[0])  # type: ignore[union-attr, index]
    model = timm.create_model(name, num_classes=0, **args, img_size=edge)
    return model  # type: ignore[return-value]


def _probability(module: Any) -> float:
    """Return the probability of a dropout of any kind."""
    for name in ("p", "drop_prob", "prob"):
        if getattr(module, name, None) is not None:
            return float(getattr(module, name))
    return 0.0


def check_class(encoder: nn.Module, name: str) -> None:
    """Refuse what is not timm's plain VisionTransformer."""
    if type(encoder) is not VisionTransformer:
        raise ConfigError(
            f"{name} is a {type(encoder).__name__}; a student must be a plain VisionTransformer",
            todo="use for instance vit_small_patch16_224, vit_base_patch16_224 or vit_large_patch16_224",
        )


def check_encoder(encoder: VisionTransformer, grid: int) -> None:
    """Refuse, with the reason, encoders that the method does not describe."""
    check_class(encoder, type(encoder).__name__)
    reasons = {
        "its patches are not cut by a plain PatchEmbed": type(encoder.patch_embed) is not PatchEmbed,
        "it has no class token": encoder.cls_token is None,
        "it has register tokens": encoder.num_prefix_tokens > 1,
        "its class token has no position": encoder.no_embed_class,
        "it has no position embedding": encoder.pos_embed is None,
        "it drops tokens, features or paths at random": any(
            isinstance(m, nn.Dropout | DropPath | PatchDropout) and _probability(m) > 0 for m in encoder.modules()
        ),
        "its blocks have LayerScale or query and key norms": any(
            isinstance(m, LayerScale) or (isinstance(m, Attention) and not isinstance(m.q_norm, nn.Identity))
            for m in encoder.modules()
        ),
        "it has a LayerNorm before the blocks": not isinstance(encoder.norm_pre, nn.Identity),
        "it has no final LayerNorm": isinstance(encoder.norm, nn.Identity),
        f"its grid is {encoder.patch_embed.grid_size}, the targets' is {grid} x {grid}": tuple(
            encoder.patch_embed.grid_size
        )
        != (grid, grid),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"this encoder cannot be a student: {reason}",
                todo="use a plain timm ViT such as vit_base_patch16_224",
            )
