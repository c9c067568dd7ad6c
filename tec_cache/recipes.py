"""Names of base models, the settings that go with each, and the pretraining recipe.

Plain tables without torch, because the command line shows them in its help. k and tau are the paper's where
it gives them (MAE-B, MAE-L, iBOT-B); the others take the nearest of these and say so in `source`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
    """Where the authors publish them; of those with a licence to agree to, timm's copy."""
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
_TIMM = "https://huggingface.co/timm/{}/resolve/main/model.safetensors"
_KIN_OF_IBOT = "not in the paper: k and tau of iBOT, the nearest kin"


def _dinov2(size: str, short: str) -> dict[str, BaseRecipe]:
    plain = BaseRecipe(
        timm_name=f"vit_{size}_patch14_dinov2.lvd142m",
        hub=True,
        official_file=_DINOV2.format(short, "pretrain"),
        release="dinov2",
        k=9,
        source=_KIN_OF_IBOT,
    )
    registers = BaseRecipe(
        timm_name=f"vit_{size}_patch14_reg4_dinov2.lvd142m",
        hub=True,
        official_file=_DINOV2.format(short, "reg4_pretrain"),
        release="dinov2",
        k=9,
        source=_KIN_OF_IBOT,
    )
    return {f"dinov2_{size}": plain, f"dinov2_{size}_reg": registers}


def _of_timm(timm_name: str, release: str, file: str = "", **how: Any) -> BaseRecipe:
    """Return the recipe of weights that timm's hub keeps; file: whose copy, where that has another name."""
    return BaseRecipe(
        timm_name=timm_name, hub=True, official_file=_TIMM.format(file or timm_name), release=release, **how
    )


def _dinov3(size: str) -> BaseRecipe:
    return _of_timm(f"vit_{size}_patch16_dinov3.lvd1689m", "dinov3", k=9, source=_KIN_OF_IBOT)


def _clip(size: str, patch: int) -> BaseRecipe:
    # timm has OpenAI's weights under a class with plain GELU too, which is not what they were trained with
    file = f"vit_{size}_patch{patch}_clip_224.openai"
    return _of_timm(f"vit_{size}_patch{patch}_clip_quickgelu_224.openai", "clip", file)


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
        source=_KIN_OF_IBOT,
    ),
    "dino_small": BaseRecipe(
        timm_name="vit_small_patch16_224.dino",
        hub=True,
        official_file=_DINO.format("deitsmall16"),
        release="dino",
        k=9,
        source=_KIN_OF_IBOT,
    ),
    **_dinov2("small", "vits14"),
    **_dinov2("base", "vitb14"),
    **_dinov2("large", "vitl14"),
    **_dinov2("giant", "vitg14"),
    "dinov3_small": _dinov3("small"),
    "dinov3_base": _dinov3("base"),
    "dinov3_large": _dinov3("large"),
    "clip_base": _clip("base", 16),
    "clip_large": _clip("large", 14),
    # without the pooling by attention, which no target is taken from
    "siglip2_base": _of_timm("vit_base_patch16_siglip_gap_224.v2_webli", "siglip2"),
    "siglip2_large": _of_timm("vit_large_patch16_siglip_gap_256.v2_webli", "siglip2"),
    "eva02_small": _of_timm("eva02_small_patch14_224.mim_in22k", "eva02"),
    "eva02_base": _of_timm("eva02_base_patch14_224.mim_in22k", "eva02"),
    "eva02_large": _of_timm("eva02_large_patch14_224.mim_m38m", "eva02"),
    "radio_base": _of_timm("vit_base_patch16_radio_v3.c_radio", "radio"),
    "radio_large": _of_timm("vit_large_patch16_radio_v3.c_radio", "radio"),
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
    every = f"one of {', '.join(BASES)}; or timm:NAME; or a weight file or folder (an export, timm's, transformers')"
    if "convnext" in base.lower():
        return ConfigError(
            f"a ConvNeXt cannot be a base, so there is no {base!r}: it has no tokens and no attention to learn from",
            todo=every,
        )
    word = _written_as_here(base)
    alike = of_generation(word, BASES)
    if _family(word) in map(_family, BASES):
        alike = [name for name in alike if _family(name) == _family(word)]
    near = nearest(word, alike)
    # whoever mistyped a name needs no list of thirty
    return ConfigError(
        f"unknown base {base!r}{near}",
        todo="give one of these, timm:NAME, a weight file or a folder" if near else every,
    )


_SIZES = {"s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}


def _written_as_here(base: str) -> str:
    """Return a name in the table's spelling: dinov3_base of DINO-v3-base, dinov3_vitb16, dinov3-b."""
    word = re.sub(r"[^a-z0-9]+", "_", base.lower())
    word = re.sub(r"_v(?=\d)", "v", word)
    return re.sub(r"_(?:vit_?)?([sblhg])_?(?:1[46])?(?=_|$)", lambda found: f"_{_SIZES[found[1]]}", word)


def _family(name: str) -> str:
    """Return what stands before a generation's number: dino of dinov3_base."""
    return re.split(r"v?\d|_", name, maxsplit=1)[0]


def of_generation(word: str, known: Iterable[str]) -> list[str]:
    """Return the names of the same generation of models as `word`: DINOv2 is no misspelt DINOv3."""
    return [name for name in known if _generations(name) == _generations(word)]


def _generations(name: str) -> set[int]:
    """Return the numbers that models bear as generations, {3} of vit_base_patch16_dinov3; sizes in pixels are none."""
    found = re.findall(r"(?<![a-z])(?!patch|reg|window)[a-z]{3,}?(?:_?v)?_?(\d{1,2})(?=[._]|$)", name.lower())
    return {int(number) for number in found}


def decoder_shape(student_width: int) -> tuple[int, int]:
    """Return the decoder's default (width, heads): (512, 16) for ViT-Ti, S and B, (768, 16) for ViT-L and up."""
    return (768, 16) if student_width >= 1024 else (512, 16)
