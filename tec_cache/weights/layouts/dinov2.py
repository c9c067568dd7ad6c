"""DINOv2's own names: registers, packed SwiGLU, and blocks in chunks as its trainer saves them."""

from __future__ import annotations

import re

from torch import Tensor

from tec_cache.errors import WeightsError
from tec_cache.weights.layouts.layout import Converted, Layout, State, renamed
from tec_cache.weights.layouts.plain import BLOCK, HEADS, STEM

_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.(.+)")


def applies(tensors: State) -> bool:
    """Say whether a name is there that only DINOv2 has; its mask token is (1, C), that of others (1, 1, C)."""
    mask = tensors.get("mask_token")
    return (
        "register_tokens" in tensors
        or (mask is not None and mask.ndim == 2)
        or any(".mlp.w12." in name or _CHUNKED.fullmatch(name) for name in tensors)
    )


def without_chunks(tensors: State) -> dict[str, Tensor]:
    """Undo the chunks of a trainer that splits its blocks for FSDP: block 5 is called `blocks.1.5`.

    The second number counts through the whole network. Raises WeightsError where it does not.
    """
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        match = _CHUNKED.fullmatch(name)
        new = f"blocks.{match[1]}.{match[2]}" if match else name
        if new in result:
            raise WeightsError(f"the blocks are in chunks, and two of them hold a {new}")
        result[new] = value
    return result


def convert(tensors: dict[str, Tensor]) -> Converted:
    """Return timm's names; with registers timm adds positions to patches only, so the class's joins its token."""
    rules = ((r"(.*)\.mlp\.w12\.(.*)", r"\1.mlp.fc1.\2"), (r"(.*)\.mlp\.w3\.(.*)", r"\1.mlp.fc2.\2"))
    packed = any(".mlp.w12." in name for name in tensors)  # a w3 without w12 is an unpacked SwiGLU
    converted = renamed(without_chunks(tensors), rules if packed else (), HEADS)
    state = converted.state
    if "register_tokens" in state:
        position = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + position[:, :1]
        state["pos_embed"] = position[:, 1:].clone()
    return converted


LAYOUT = Layout("DINOv2's own", STEM, BLOCK, applies, convert, lambda _: "dinov2")
