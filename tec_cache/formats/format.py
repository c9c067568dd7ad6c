"""What a format is, and the steps that several of them share: one plain encoder, and renaming that loses nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tec_cache.errors import TecCacheError, listed
from tec_cache.formats.model import Model


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A model as the files of a folder of another library."""

    files: dict[str, bytes]
    """By their names in the folder."""
    left_out: dict[str, str]
    """Names of weights, or of a group of them, that the format has no place for -> why."""
    changed: tuple[str, ...] = ()
    """What was computed anew although the model's outputs stay the same."""
    usage: str
    """Python that loads it; FOLDER stands for the folder."""


@dataclass(frozen=True)
class Format:
    """One library's way of keeping a vision transformer."""

    name: str
    """As in `--to`."""
    title: str
    """What it is, in a sentence's middle."""
    convert: Callable[[Model], Converted]
    """Raises TecCacheError for a model that it cannot hold."""


@dataclass(frozen=True)
class Plain:
    """An encoder in the form that all libraries know: no LayerScale, a bias everywhere, positions apart.

    Its outputs are the model's; each step here is an identity of the computation, not an approximation.
    """

    state: dict[str, Tensor]
    """timm's names without cls_token, reg_token and pos_embed."""
    class_token: Tensor | None
    """(1, 1, C), without its row of the position embedding."""
    registers: Tensor | None
    """(1, R, C), their rows of the position embedding added."""
    positions: Tensor
    """(1, 1 + N, C): the class token's row, zeros where it has none, then the patches' rows."""
    changed: list[str] = field(default_factory=list)


def plain(model: Model) -> Plain:
    """Bring a model into the plain form."""
    state = dict(model.state)
    changed: list[str] = []
    _multiply_scales(state, changed)
    _add_biases(state, changed)
    token, registers = state.pop("cls_token", None), state.pop("reg_token", None)
    patches = model.grid**2
    positions = state.pop("pos_embed", torch.zeros(1, patches, model.width))
    rows, positions = positions[:, :-patches], positions[:, -patches:]
    first = torch.zeros(1, 1, model.width)
    if rows.shape[1]:
        first, own = (rows[:, :1], rows[:, 1:]) if token is not None else (first, rows)
        if registers is not None and own.shape[1]:
            registers = registers + own
            changed.append("the registers' rows of pos_embed are added to reg_token")
    elif token is not None:
        changed.append("pos_embed has a row of zeros for the class token, which had none")
    return Plain(state, token, registers, torch.cat([first, positions], 1), changed)


def _multiply_scales(state: dict[str, Tensor], changed: list[str]) -> None:
    """Take LayerScale away: gamma * (W x + b) is (gamma W) x + gamma b."""
    for name in [name for name in state if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        block, which, _ = name.rsplit(".", 2)
        layer = f"{block}.attn.proj" if which == "ls1" else f"{block}.mlp.fc2"
        gamma = state.pop(name)
        state[f"{layer}.weight"] = gamma[:, None] * state[f"{layer}.weight"]
        if f"{layer}.bias" in state:
            state[f"{layer}.bias"] = gamma * state[f"{layer}.bias"]
        if not changed:
            changed.append("LayerScale is multiplied into attn.proj and mlp.fc2")


def _add_biases(state: dict[str, Tensor], changed: list[str]) -> None:
    """Give layers without a bias one of zeros; not query, key and value, whose bias all formats can do without."""
    lacking = [
        n.removesuffix("weight") for n in state if re.fullmatch(r"blocks\.\d+\.(attn\.proj|mlp\.fc\d)\.weight", n)
    ]
    lacking = [name for name in lacking if f"{name}bias" not in state]
    for name in lacking:
        state[f"{name}bias"] = torch.zeros(state[f"{name}weight"].shape[0])
    if lacking:
        changed.append("attn.proj, mlp.fc1 and mlp.fc2 have biases of zeros, where they had none")


def renamed(
    state: Mapping[str, Tensor], rules: Iterable[tuple[str, str]], left_out: Mapping[str, str], model: Model, to: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename by the first pattern that matches a whole name; return the result, and what is left out with its reason.

    left_out: pattern of names -> why. Raises TecCacheError where a name matches none: nothing is dropped unsaid.
    """
    patterns = [(re.compile(pattern), new) for pattern, new in rules]
    result: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    foreign: list[str] = []
    for name, value in state.items():
        new = next((match.expand(theirs) for pattern, theirs in patterns if (match := pattern.fullmatch(name))), None)
        why = next((why for pattern, why in left_out.items() if re.fullmatch(pattern, name)), None)
        if new is not None:
            result[new] = value.contiguous()
        elif why is not None:
            dropped[name] = why
        else:
            foreign.append(name)
    if foreign:
        raise refused(model, to, f"has no place for {listed(foreign, 4)}")
    return result, dropped


def refused(model: Model, to: str, what: str, todo: str = "") -> TecCacheError:
    """Return the error for a model that a format cannot hold."""
    todo = todo or "take --to timm, which holds every model; or load the export itself, which timm does"
    return TecCacheError(f"{to} {what}", where=str(model.folder), todo=todo)


def activation(model: Model, to: str, known: Mapping[str, str]) -> str:
    """Return a format's name of the model's activation. Raises TecCacheError where it has none."""
    if model.activation not in known:
        raise refused(model, to, f"has no activation {model.activation}, only {', '.join(known)}")
    return known[model.activation]


def in_three(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Cut NAME.weight (3 C, C) and NAME.bias into {"query.weight": ..., ...}; without a bias, of the weights alone."""
    parts: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in state:
            three = zip(("query", "key", "value"), state[f"{name}.{kind}"].chunk(3), strict=True)
            parts |= {f"{part}.{kind}": value.contiguous() for part, value in three}
    return parts


def adapters_left_out(model: Model) -> dict[str, str]:
    """Name what lies in the export's folder of adapters, which no other library has a place for."""
    why = {
        "input_adapter": "folded into the class token already; timm's and other classes have no such module",
        "encoder_adapters": "they make Z_e for this program's decoder and its light tuning",
        "segmentation_head": "the head of tec-cache segment",
    }
    found = dict.fromkeys(re.split(r"[./]", name, maxsplit=1)[0] for name in model.adapters)
    return {f"adapters: {name}": why.get(name, "no other library knows it") for name in found}
