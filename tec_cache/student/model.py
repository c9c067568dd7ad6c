"""The student: a timm ViT that sees a quarter of the patches, between adapters and a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.layers import DropPath, PatchDropout, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tec_cache.errors import ConfigError, nearest
from tec_cache.model_args import check_model_args
from tec_cache.printable import counted
from tec_cache.recipes import decoder_shape, of_generation
from tec_cache.student.adapters import EncoderAdapters, Mlp
from tec_cache.student.blocks import draws, run_block
from tec_cache.student.decoder import Decoder
from tec_cache.student.heads import HEADS, Branch, Head
from tec_cache.student.masking import Mask, num_visible_patches, random_mask
from tec_cache.student.position import sincos_position
from tec_cache.targets import narrow_rows
from tec_cache.types import Targets, TargetSpec

Adapters = Literal["both", "input", "encoder", "none"]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a student learns from one set of targets."""

    spec: TargetSpec
    tau: float = 1.0
    """Temperature of the target's attention."""


class Student(nn.Module):
    """Encoder, adapters and decoder for one or several sets of targets over one grid; see `create_student`.

    The encoder is timm's own module, so its weights leave as a timm checkpoint; it may have LayerScale, norms of
    queries and keys, and registers, which no mask hides and neither adapters nor decoder see. All sets share the
    encoder, the mask and the input adapter, since another class token would need another pass through the encoder, and
    the decoder's blocks. Each has encoder adapters of its own (unless `adapters_shared`) and a head for each kind of
    target.
    balanced: keep room for the norms that `tasks.gradients` weighs the sets by.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        targets: TargetSpec | Mapping[str, Goal],
        *,
        adapters: Adapters = "both",
        adapters_shared: bool = False,
        balanced: bool = False,
        mask_ratio: float = 0.75,
        tau: float = 1.0,
        decoder_depth: int = 2,
        decoder_width: int | None = None,
        decoder_heads: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        goals = {"": Goal(spec=targets, tau=tau)} if isinstance(targets, TargetSpec) else dict(targets)
        self.grid, tokens = _common_grid(goals)
        check_encoder(encoder, self.grid)
        if adapters not in ("both", "input", "encoder", "none"):
            raise ConfigError(f"unknown adapters {adapters!r}", todo="one of: both, input, encoder, none")
        if not 0 < num_visible_patches(tokens, mask_ratio) < tokens:
            raise ConfigError(
                f"mask ratio {mask_ratio} of {tokens} patches leaves none visible or none masked",
                todo="give a --mask-ratio between, such as 0.75",
            )
        for goal in goals.values():
            _check_goal(goal)
        width, heads = decoder_shape(encoder.embed_dim)
        width = width if decoder_width is None else decoder_width
        heads = heads if decoder_heads is None else decoder_heads
        if width < 1 or heads < 1 or width % heads:
            raise ConfigError(
                f"a decoder of width {width} with {counted(heads, 'head')}", todo="use a width that the heads divide"
            )
        channel, depth = encoder.embed_dim, len(encoder.blocks)
        self.goals, self.mask_ratio = goals, mask_ratio
        self.checkpointing, self.draws = checkpointing, draws(encoder.blocks)
        self.encoder: Any = encoder  # timm types its optional tokens as None or Parameter
        self.num_prefix = int(encoder.num_prefix_tokens)
        """Tokens before the patches: the class token, then registers."""
        self.input_adapter = Mlp(channel, 4 * channel) if adapters in ("both", "input") else None
        fused = adapters in ("both", "encoder")
        count = (1 if adapters_shared else len(goals)) if fused else 0
        self.encoder_adapters = nn.ModuleList(EncoderAdapters(depth, channel, 4 * width) for _ in range(count))
        """One for each set in the order of the sets, one for all, or none."""
        self.heads = nn.ModuleList(
            nn.ModuleDict({kind.kind: kind(channel, width, goal.spec) for kind in HEADS if kind.wanted(goal.spec)})
            for goal in goals.values()
        )
        """The heads of each set by kind, in the order of the sets."""
        self.decoder = Decoder(
            grid=self.grid, width=width, depth=decoder_depth, heads=heads, checkpointing=checkpointing
        )
        norms = torch.zeros(len(goals)) if balanced and len(goals) > 1 else None
        self.gradient_norms: torch.Tensor | None
        self.register_buffer("gradient_norms", norms)
        """(S,) running means of the sets' gradient norms, where their weights follow them."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as MAE does: xavier-uniform linears with zero bias, tokens normal(0, 0.02), fixed positions.

        LayerScale stays as timm makes it, by the architecture's `init_values`.
        """
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
        for module in self.heads.modules():
            if isinstance(module, Branch):
                nn.init.normal_(module.mask_token, std=0.02)
        if self.encoder.reg_token is not None:
            nn.init.normal_(self.encoder.reg_token, std=0.02)
        prefix = 0 if self.encoder.no_embed_class else self.num_prefix
        with torch.no_grad():
            self.encoder.pos_embed.copy_(sincos_position(self.encoder.embed_dim, self.grid, prefix))
        self.encoder.pos_embed.requires_grad_(False)

    def class_token(self) -> torch.Tensor:
        """Return the class token that enters the encoder, (1, 1, C): T' = MLP(T) with an input adapter, else T."""
        token: torch.Tensor = self.encoder.cls_token
        return token if self.input_adapter is None else self.input_adapter(token)

    def prefix_tokens(self) -> torch.Tensor:
        """Return the tokens before the patches, without positions, (1, P, C): the class token, then registers."""
        registers: torch.Tensor | None = self.encoder.reg_token
        return self.class_token() if registers is None else torch.cat([self.class_token(), registers], dim=1)

    def forward_layers(self, images: torch.Tensor, mask: Mask) -> list[torch.Tensor]:
        """Encode the visible patches: the outputs (M B, P + V, C) of all blocks, the last behind the final norm.

        images: (B, 3, S, S) float, normalized; mask: of M B rows, row m B + i is a mask of image i. P = num_prefix.
        """
        position = self.encoder.pos_embed
        own, patches = position.split([position.shape[1] - self.grid**2, self.grid**2], dim=1)
        x = self.embed_visible(images, mask) + patches[0][mask.visible]
        first = self.prefix_tokens()
        first = first + own if own.shape[1] else first
        x = torch.cat([first.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        layers = []
        for block in self.encoder.blocks:
            x = run_block(block, x, self.checkpointing, draws=self.draws)
            layers.append(x)
        layers[-1] = self.encoder.norm(x)
        return layers

    def fused(self, layers: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return what each set's heads read, Z_e (M B, 1 + V, C): the layers as its encoder adapters fuse them.

        layers: (M B, P + V, C) of all blocks. Registers end here: the adapters look at each token by itself.
        """
        if self.num_prefix > 1:
            layers = [torch.cat([x[:, :1], x[:, self.num_prefix :]], dim=1) for x in layers]
        if not self.encoder_adapters:
            return layers[-1:] * len(self.goals)
        found = [adapters(layers) for adapters in self.encoder_adapters]
        return found * (len(self.goals) // len(found))

    def embed_visible(self, images: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Embed the visible patches alone: (M B, V, C). The convolution of timm's patch embedding is a Linear.

        Three quarters of that convolution, forward and backward, would be thrown away: 2 % of a ViT-B's step.
        """
        grid, embed = self.grid, self.encoder.patch_embed
        batch, colours, size, _ = images.shape
        patches = images.view(batch, colours, grid, size // grid, grid, size // grid).permute(0, 2, 4, 1, 3, 5)
        view = torch.arange(len(mask.order), device=images.device)[:, None] % batch
        seen = patches[view, mask.visible // grid, mask.visible % grid].flatten(2)
        x: torch.Tensor = embed.norm(nn.functional.linear(seen, embed.proj.weight.flatten(1), embed.proj.bias))
        return x

    def forward(
        self, images: torch.Tensor, targets: Targets | Mapping[str, Targets], *, noise: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the losses, scalars float32: {"feature", "attention", "class"}, of several sets {"NAME/feature", ...}.

        images: (B, 3, S, S) normalized. targets: of each set, normalized features (B, L, C) and attention rows, from
        the cache, from the base online, or pixels. noise: (M B, L), decides the masks, M of each view: row m B + i is
        mask m of view i. There is no "attention" and no "class" without such targets.
        """
        mask = random_mask(noise, self.mask_ratio)
        return self.judged(self.forward_layers(images, mask), targets, mask)

    def judged(
        self, layers: list[torch.Tensor], targets: Targets | Mapping[str, Targets], mask: Mask
    ) -> dict[str, torch.Tensor]:
        """Return the losses of `forward` from the outputs of all blocks: adapters, decoder and heads."""
        given = {"": targets} if isinstance(targets, Targets) else targets
        wanted = {name: narrow_rows(given[name], goal.spec.k) for name, goal in self.goals.items()}
        encoded = dict(zip(self.goals, self.fused(layers), strict=True))
        tokens = [
            h.tokens(encoded[name], mask, self.decoder.position) for name, h in self.each() if isinstance(h, Branch)
        ]
        decoded = iter(self.decoder(tokens))
        losses = {}
        for name, head in self.each():
            x = next(decoded) if head.branch else encoded[name]
            losses[term(name, head.kind)] = head.loss(x, wanted[name], mask, self.goals[name].tau)
        return losses

    def each(self) -> Iterator[tuple[str, Head]]:
        """Yield each head with its set's name, in the order of the losses."""
        for name, heads in zip(self.goals, self.heads, strict=True):
            for head in heads.values():  # type: ignore[operator]
                yield name, head


def term(name: str, kind: str) -> str:
    """Name the loss of one kind of one set; the set of a training with no other needs no name."""
    return f"{name}/{kind}" if name else kind


def _common_grid(goals: Mapping[str, Goal]) -> tuple[int, int]:
    """Return the patches per side, and the tokens, of all sets."""
    grids = {goal.spec.grid_shape for goal in goals.values()}
    if len(grids) != 1:
        raise ConfigError(f"target sets over different grids, {sorted(grids)}", todo="train on sets over one grid")
    return next(iter(goals.values())).spec.grid, next(iter(goals.values())).spec.num_tokens


def _check_goal(goal: Goal) -> None:
    """Raise ConfigError for what no head can be made for."""
    if goal.tau <= 0:
        raise ConfigError(f"tau {goal.tau}", todo="give a --tau above 0")
    if goal.spec.k is not None and goal.spec.channels % goal.spec.num_heads:
        raise ConfigError(
            f"{counted(goal.spec.channels, 'channel')} cannot be divided among {counted(goal.spec.num_heads, 'head')}"
        )


def create_student(
    name: str = "vit_base_patch16_224",
    *,
    targets: TargetSpec | Mapping[str, Goal],
    model_args: dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Student:
    """Create a randomly initialized student for targets of one spec, or of several sets by name.

    name, model_args: a plain vision transformer of timm and arguments that change it (`patch_size`,
    `embed_dim`, `depth`, ...); its input becomes grid * patch pixels. options: arguments of `Student`.
    The weights are a function of `seed` and leave torch's generator as it was. Raises ConfigError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grid = targets.grid if isinstance(targets, TargetSpec) else _common_grid(targets)[0]
        return Student(create_encoder(name, grid, model_args), targets, **options)


def student_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `Student` that a training's settings decide, as run.json keeps these."""
    same = ("adapters", "adapters_shared", "mask_ratio", "decoder_depth", "decoder_width", "decoder_heads")
    return {name: config[name] for name in same} | {"balanced": config["balance"] == "norm"}


def create_encoder(name: str, grid: int, model_args: dict[str, Any] | None = None) -> VisionTransformer:
    """Create a timm model whose input is grid * patch pixels."""
    args = check_model_args(model_args or {}, f"the student {name}")
    for given, why in (("img_size", "input size follows from grid and patch"), ("num_classes", "head is its decoder")):
        if given in args:
            raise ConfigError(f"the student's {why}", todo=f"leave out {given}")
    if not timm.is_model(name):
        near = nearest(name, of_generation(name, timm.list_models("vit*")))
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
            todo="use for instance vit_small_patch16_224, vit_base_patch16_224 or vit_base_patch14_reg4_dinov2",
        )


def check_encoder(encoder: VisionTransformer, grid: int) -> None:
    """Refuse, with the reason, encoders that the method does not describe."""
    check_class(encoder, type(encoder).__name__)
    reasons = {
        "its patches are not cut by a plain PatchEmbed": type(encoder.patch_embed) is not PatchEmbed,
        "it has no class token": encoder.cls_token is None,
        "it has no position embedding": encoder.pos_embed is None,
        "it drops tokens, features or paths at random": any(
            isinstance(m, nn.Dropout | DropPath | PatchDropout) and _probability(m) > 0 for m in encoder.modules()
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
