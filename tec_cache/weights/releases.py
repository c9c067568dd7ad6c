"""What each release of pretrained weights fixes that no shape in its file shows, and how its file is recognised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.types import Colours
from tec_cache.weights.search import Found, leaves

Statistics = tuple[Colours, Colours]

IMAGENET: Statistics = (IMAGENET_MEAN, IMAGENET_STD)
OPENAI: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Of CLIP's photos, which EVA-02 and RADIO take too."""
HALF: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Pixels from -1 to 1."""
SATELLITE: Statistics = ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))
"""Of the satellite images (SAT-493M) of two of DINOv3's models."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """What all files of one release have in common."""

    title: str
    """Its name in messages."""
    statistics: Statistics | None = IMAGENET
    """Pixel mean and deviation; None where they differ within the release."""
    also: tuple[Statistics, ...] = ()
    """Others that some of its models use and that a name may therefore state."""
    heads: Mapping[int, int] = field(default_factory=dict)
    """Width -> heads of the models that were released."""
    activation: str | None = "gelu"
    """Of the plain MLP; a SwiGLU has its own."""


_64 = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 1536: 24}
"""Heads of width 64, as most have them."""

RELEASES: dict[str, Release] = {
    "mae": Release(title="MAE", heads={768: 12, 1024: 16, 1280: 16}),
    "dino": Release(title="DINO", heads={w: _64[w] for w in (192, 384, 768)}),
    "ibot": Release(title="iBOT", heads={w: _64[w] for w in (384, 768, 1024)}),
    "mocov3": Release(title="MoCo v3", heads={384: 12, 768: 12}),
    "dinov2": Release(title="DINOv2", heads={w: _64[w] for w in (384, 768, 1024, 1536)}),
    "dinov3": Release(
        title="DINOv3", also=(SATELLITE,), heads={w: _64[w] for w in (192, 384, 768, 1024, 1280)} | {4096: 32}
    ),
    "tec": Release(title="TEC", heads={768: 12, 1024: 16}),
    # OpenAI's were trained with QuickGELU and its statistics, OpenCLIP's mostly without; the names are the same
    "clip": Release(title="CLIP", statistics=None, heads={768: 12, 1024: 16, 1280: 16}, activation=None),
    # of its sizes timm computes some with GELU by tanh, some exactly
    "siglip2": Release(
        title="SigLIP 2", statistics=HALF, heads={768: 12, 1024: 16, 1152: 16, 1536: 16}, activation=None
    ),
    "eva02": Release(
        title="EVA-02", statistics=OPENAI, heads={w: _64[w] for w in (192, 384, 768, 1024)}, activation=None
    ),
    "radio": Release(title="RADIO", statistics=OPENAI, heads={768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24}),
}

_RELATED = ({"dino", "ibot"},)
"""Releases whose files may look alike and which fix the same."""

_TAGS = {
    "mae": "mae",
    "dino": "dino",
    "lvd142m": "dinov2",
    "lvd1689m": "dinov3",
    "sat493m": "dinov3",
    "openai": "clip",
    "v2_webli": "siglip2",
    "mim_in22k": "eva02",
    "mim_m38m": "eva02",
    "c_radio": "radio",
}
"""Release of the weights that a tag of timm names."""

# What only one release has in a name or in the keys around it; the first that fits counts.
_MARKS = {
    "mocov3": ("base_encoder.", "momentum_encoder."),
    "mae": ("decoder_embed.", "decoder_blocks.", "decoder.decoder_layers.", "decoder.mask_token"),
    "dinov2": ("dino_head.", "ibot_head."),
    "ibot": ("ibot_loss", "masked_embed", "head.mlp2", "head.last_layer2"),
    "dino": ("head.mlp.", "head.last_layer."),
}


def contradict(one: str, other: str) -> bool:
    """Say whether weights cannot be of both releases."""
    return one != other and not any({one, other} <= group for group in _RELATED)


def release_of_tag(tag: str) -> str | None:
    """Return the release of a timm tag ("mae" of "vit_base_patch16_224.mae"), None where it is none of these."""
    return _TAGS.get(tag)


def recognised(content: Mapping[Any, Any], found: Found, state: Mapping[str, Tensor]) -> str | None:
    """Name the release that a file certainly is of, None where nothing in it tells.

    content: all of the file. state: the encoder under timm's names. The layout, marks in any name of the file, and
    MAE's and MoCo v3's fixed position embeddings tell; a bare encoder says nothing.
    """
    release = found.layout.release(found.tensors)
    if release == "tec":
        return release
    names = [name for name, _ in leaves(content)] + [str(key) for key in content]
    for kind, marks in _MARKS.items():
        if any(mark in name for name in names for mark in marks):
            # DINOv3's trainer has DINOv2's heads, and its names say more
            return release if kind == "dinov2" and release == "dinov3" else kind
    if release is not None:
        return release
    return _fixed_positions(state)


def _fixed_positions(state: Mapping[str, Tensor]) -> str | None:
    """Tell MAE and MoCo v3 by their position embeddings (1, 1 + n * n, C), which are sines and never learned."""
    given = state.get("pos_embed")
    if given is None or given.ndim != 3 or "cls_token" not in state or given.shape[2] % 4 or given.shape[1] < 5:
        return None
    side = round((given.shape[1] - 1) ** 0.5)
    if side * side != given.shape[1] - 1 or given[0, 0].count_nonzero():
        return None
    quarter = given.shape[2] // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    axis = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    wave = torch.cat([axis.sin(), axis.cos()], dim=1)
    slow, fast = wave[:, None].expand(side, side, -1), wave[None].expand(side, side, -1)
    patches = given[0, 1:].double()
    for kind, halves in {"mae": [fast, slow], "mocov3": [slow, fast]}.items():
        if torch.allclose(patches, torch.cat(halves, dim=2).reshape(side * side, -1), rtol=0, atol=5e-3):
            return kind
    return None
