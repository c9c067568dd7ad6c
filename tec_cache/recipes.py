"""Names of base models, the settings that go with each, and the pretraining recipe.

Plain tables without torch, because the command line shows them in its help. k and tau are the paper's where
it gives them (MAE-B, MAE-L, iBOT-B); the others take the nearest of these and say so in `source`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tec_cache.errors import ConfigError, nearest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Pixel mean of the student, and of every base whose configuration does not say otherwise."""
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """One known base model."""

    timm_name: str
    """Architecture, and where `hub` is true also the weights, in timm."""
    hub: bool
    """Whether timm's hub has the weights."""
    official_file: str
    """Where the authors publish them."""
    release: str = ""
    """Whose weights these are, of `weights.releases`."""
    k: int = 15
    tau: float = 1.0
    source: str = "not in the paper: k of MAE, tau 1"
    """Where k and tau come from."""


_MAE = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_{}.pth"
_DINO = "https://dl.fbaipublicfiles.com/dino/dino_{0}_pretrain/dino_{0}_pretrain.pth"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}/dinov2_{0}_{1}.pth"
_IBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/{}/checkpoint_teacher.pth"
_MOCO = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"


def _dinov2(size: str, short: str) -> dict[str, BaseRecipe]:
    source = "not in the paper: k and tau of iBOT, the nearest kin"
    plain = BaseRecipe(
        timm_name=f"vit_{size}_patch14_dinov2.lvd142m",
        hub=True,
        official_file=_DINOV2.format(short, "pretrain"),
        release="dinov2",
        k=9,
        source=source,
    )
    registers = BaseRecipe(
        timm_name=f"vit_{size}_patch14_reg4_dinov2.lvd142m",
        hub=True,
        official_file=_DINOV2.format(short, "reg4_pretrain"),
        release="dinov2",
        k=9,
        source=source,
    )
    return {f"dinov2_{size}": plain, f"dinov2_{size}_reg": registers}


BASES: dict[str, BaseRecipe] = {
    "mae": BaseRecipe(
        timm_name="vit_base_patch16_224.mae",
        hub=True,
        official_file=_MAE.format("base"),
        release="mae",
        k=15,
        tau=1.8,
        source="paper, MAE-B",
    ),
    "mae_large": BaseRecipe(
        timm_name="vit_large_patch16_224.mae",
        hub=True,
        official_file=_MAE.format("large"),
        release="mae",
        k=15,
        tau=1.4,
        source="paper, MAE-L",
    ),
    "mae_huge": BaseRecipe(
        timm_name="vit_huge_patch14_224.mae",
        hub=True,
        official_file=_MAE.format("huge"),
        release="mae",
        k=15,
        tau=1.4,
        source="not in the paper: k and tau of MAE-L",
    ),
    "dino": BaseRecipe(
        timm_name="vit_base_patch16_224.dino",
        hub=True,
        official_file=_DINO.format("vitbase16"),
        release="dino",
        k=9,
        source="not in the paper: k and tau of iBOT, the nearest kin",
    ),
    "dino_small": BaseRecipe(
        timm_name="vit_small_patch16_224.dino",
        hub=True,
        official_file=_DINO.format("deitsmall16"),
        release="dino",
        k=9,
        source="not in the paper: k and tau of iBOT, the nearest kin",
    ),
    **_dinov2("small", "vits14"),
    **_dinov2("base", "vitb14"),
    **_dinov2("large", "vitl14"),
    **_dinov2("giant", "vitg14"),
    "ibot": BaseRecipe(
        timm_name="vit_base_patch16_224",
        hub=False,
        official_file=_IBOT.format("vitb_16"),
        release="ibot",
        k=9,
        tau=1.0,
        source="paper, iBOT-B",
    ),
    "ibot_large": BaseRecipe(
        timm_name="vit_large_patch16_224",
        hub=False,
        official_file=_IBOT.format("vitl_16"),
        release="ibot",
        k=9,
        tau=1.0,
        source="not in the paper: k and tau of iBOT-B",
    ),
    "mocov3": BaseRecipe(timm_name="vit_base_patch16_224", hub=False, official_file=_MOCO, release="mocov3"),
}

DEFAULT_RECIPE = BaseRecipe(timm_name="", hub=False, official_file="")
"""What an unknown base (timm:NAME, a file, an export) gets: k 15, tau 1."""


def recipe_of(base: str) -> BaseRecipe:
    """Return the recipe of a named base, or the default for `timm:NAME` and paths."""
    return BASES.get(base, DEFAULT_RECIPE)


def unknown_base(base: str) -> ConfigError:
    """Return the error for a name that is neither known, nor timm:NAME, nor an existing path."""
    return ConfigError(
        f"unknown base {base!r}{nearest(base, BASES)}",
        todo=f"one of {', '.join(BASES)}; or timm:NAME; or a weight file or folder (an export, timm's, transformers')",
    )


def decoder_shape(student_width: int) -> tuple[int, int]:
    """Return the decoder's default (width, heads): (512, 16) for ViT-Ti, S and B, (768, 16) for ViT-L and up."""
    return (768, 16) if student_width >= 1024 else (512, 16)
