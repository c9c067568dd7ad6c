"""Weight files -> the encoder's tensors under timm's names.

`content` reads a file without running anything in it, `search` finds the encoder behind whatever keys and prefixes
it lies, and its layout (`layouts`) turns the names into timm's. What comes out does not depend on the wrapping, and
neither does its SHA-256. `load.load_strict` accepts it only when every name and shape agrees: a base with one layer
left at random still yields targets that look fine.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tec_cache.errors import WeightsError
from tec_cache.weights.content import RELEASES, load_content
from tec_cache.weights.layouts import Converted
from tec_cache.weights.releases import recognised
from tec_cache.weights.search import Found, find_encoder

# EVA and BEiT have an `fc_norm` that belongs to their encoder; such files come from timm and pass through.
_EVA_MARKS = (".gamma_1", ".attn.q_bias", ".attn.q_proj.", "rope.")


@dataclass(frozen=True)
class Weights:
    """The encoder of one weight file, on the CPU, under timm's names and in the file's dtypes."""

    state: dict[str, Tensor]
    format: str
    """The release whose file this seems to be, by its names and keys, or "timm"."""
    release: str | None
    """The release (`releases.RELEASES`) whose file this certainly is; None where nothing in it tells."""
    dropped: tuple[str, ...]
    """What was left out on purpose: heads, decoders, mask tokens, the file's other networks, what is no tensor."""
    path: str
    layout: str = "timm's"
    """Whose names the file had."""
    zeros: dict[str, Tensor] = field(default_factory=dict)
    """Biases that are zero throughout, which some of timm's classes leave out; no part of `state` or its hash."""
    num_heads: int | None = None
    """Where the file tells it."""


def read_weights(path: str | Path) -> Weights:
    """Read `path` (.safetensors, an index of several, or anything `torch.save` wrote) and keep the encoder.

    Raises `WeightsError` for a file that is missing, damaged or unsafe to unpickle, for one without a vision
    transformer or with several, and for a fine-tuned one whose final norm is gone.
    """
    where = str(path)
    content = load_content(Path(path))
    found = find_encoder(content, where)
    converted = _converted(found, where)
    state = converted.state
    dropped = [*found.others, *converted.dropped, *_settle_final_norm(state, where)]
    zeros = _without_zero_biases(state)
    release = recognised(content, found, state)
    # MAE's released encoder is a bare {"model": ...}, and so are many others
    bare = found.root == "model." and not any("head." in name for name in found.tensors)
    return Weights(
        state=state,
        format=release or ("mae" if bare else "timm"),
        release=release,
        dropped=tuple(sorted(dropped)),
        path=where,
        layout=found.layout.name,
        zeros=zeros,
        num_heads=converted.num_heads,
    )


def sha256_of_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and little-endian bytes, whatever the order or the device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        # A JSON line, because names may hold any character; dtype and shape say how many bytes follow it.
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode() + b"\n")
        raw = value.reshape(-1).view(torch.uint8)
        if sys.byteorder == "big":
            raw = raw.reshape(-1, value.element_size()).flip(1).contiguous()
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def _converted(found: Found, where: str) -> Converted:
    """Rename the encoder's tensors, or say which part of it is missing."""
    try:
        return found.layout.convert(found.tensors)
    except WeightsError as error:
        raise WeightsError(error.what, where=where, todo=error.todo or RELEASES, details=error.details) from error
    except (KeyError, RuntimeError, IndexError) as error:
        raise WeightsError(
            f"an incomplete file, with {found.layout.name} names: {error}", where=where, todo=RELEASES
        ) from error


def _settle_final_norm(state: dict[str, Tensor], where: str) -> list[str]:
    """Drop an `fc_norm` beside `norm`; refuse one instead of it (it follows the mean of the tokens)."""
    pooled = [name for name in state if name.startswith("fc_norm.")]
    if not pooled or any(mark in name for name in state for mark in _EVA_MARKS):
        return []
    if not any(name.startswith("norm.") for name in state):
        raise WeightsError(
            "a fine-tuned file: it has `fc_norm` (of the averaged tokens) and no final `norm` of its encoder",
            where=where,
            todo="give the pretrained file of the same model, not the fine-tuned one",
        )
    for name in pooled:
        del state[name]
    return pooled


def _without_zero_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take out biases of query and value that are zero in every block.

    DINOv3's are, and timm has each of its models with and without them: both are the same network.
    """
    names = [name for name in state if name.endswith((".attn.q_bias", ".attn.v_bias"))]
    if any(state[name].count_nonzero() for name in names):
        return {}
    return {name: state.pop(name) for name in names}
