"""What a layout is, and the two operations that most of them need: renaming, and stacking query, key and value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tec_cache.errors import WeightsError

State = Mapping[str, Tensor]


@dataclass
class Converted:
    """The tensors of one encoder under timm's names, and what was left out on purpose."""

    state: dict[str, Tensor]
    dropped: list[str] = field(default_factory=list)
    num_heads: int | None = None
    """Where the file itself tells it."""


@dataclass(frozen=True)
class Layout:
    """One way of naming an encoder's tensors, relative to the encoder's own root."""

    name: str
    stem: str
    """Name of the patch embedding's weight: where it is, an encoder has its root."""
    block: str
    """Pattern of the beginning of a block's names."""
    applies: Callable[[State], bool]
    """Whether the names (and shapes) under a root are of this layout."""
    convert: Callable[[dict[str, Tensor]], Converted]
    """Raises KeyError or WeightsError where a part is missing."""
    release: Callable[[State], str | None] = lambda _: None
    """Name of the release (`weights.releases`) that these names alone tell, if they do."""


def renamed(tensors: State, rules: Iterable[tuple[str, str]], dropped: Iterable[str] = ()) -> Converted:
    """Rename by the first pattern that matches a whole name; leave out what matches `dropped`, keep the rest.

    Two names that become one raise WeightsError: one of them would be lost.
    """
    patterns = [(re.compile(pattern), new) for pattern, new in rules]
    left_out = [re.compile(pattern) for pattern in dropped]
    converted = Converted({})
    for name, value in tensors.items():
        if any(pattern.match(name) for pattern in left_out):
            converted.dropped.append(name)
            continue
        new = next((match.expand(to) for pattern, to in patterns if (match := pattern.fullmatch(name))), name)
        if new in converted.state:
            raise WeightsError(f"{name} and another name both are {new}")
        converted.state[new] = value
    return converted


_PART = re.compile(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)")


def stack_qkv(converted: Converted) -> Converted:
    """Put `attn.q_proj`, `k_proj` and `v_proj`, each (C, C), in that order into one `attn.qkv` (3 C, C).

    Biases likewise. Raises KeyError where one of three is missing.
    """
    tensors = converted.state
    result = {name: value for name, value in tensors.items() if not _PART.fullmatch(name)}
    for name in tensors:
        match = _PART.fullmatch(name)
        if match and match[2] == "q":
            block, kind = match[1], match[3]
            parts = [tensors[f"{block}{part}_proj.{kind}"] for part in "qkv"]
            result[f"{block}qkv.{kind}"] = torch.cat(parts)
    left = next(
        (name for name in tensors if (m := _PART.fullmatch(name)) and f"{m[1]}q_proj.{m[3]}" not in tensors), ""
    )
    if left:
        raise KeyError(left.replace(".k_proj.", ".q_proj.").replace(".v_proj.", ".q_proj."))
    return replace(converted, state=result)
