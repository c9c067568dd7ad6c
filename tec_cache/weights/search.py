"""Where in a file the encoder is: behind which keys and prefixes, and under whose names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tec_cache.errors import WeightsError, listed
from tec_cache.weights.content import RELEASES
from tec_cache.weights.layouts import LAYOUTS, Layout

TRANSPARENT = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module", "_fpw_module")
)
"""Parts of a name that a wrapper (DDP, torch.compile, FSDP, DeepSpeed, checkpointing) put there; they mean nothing."""

AVERAGED = frozenset(("teacher", "ema", "target", "averaged", "swa"))
"""Words of an averaged copy: what the authors of self-distillation and of EMA evaluate and release."""
RAW = frozenset(("student", "momentum", "online", "predictor"))
"""Words of a copy that is taken only where there is no other; MoCo v3 evaluates its base, not its momentum encoder."""

_TRAINING = re.compile(r"(optim\w*|\w*scheduler\w*|\w*scaler|callbacks|loops|hyper_parameters|rng\w*)(\.|$)")
"""What a training keeps beside a network that has no prefix of its own."""

MOST_DEPTH = 64


@dataclass(frozen=True)
class Found:
    """The encoder of a file, under its own layout's names."""

    layout: Layout
    root: str
    """What stands before the encoder's names, wrappers left out: "teacher.backbone."."""
    tensors: dict[str, Tensor]
    others: list[str]
    """Every other name in the file, without the key under which the encoder lies as well."""


def leaves(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield everything in nested dicts and lists with its name, the keys joined by dots.

    A container that occurs twice is walked once, so that neither a cycle nor a doubling takes forever.
    """
    seen: set[int] = set()
    stack: list[tuple[str, Any, int]] = [("", content, 0)]
    while stack:
        prefix, value, depth = stack.pop()
        is_map = isinstance(value, Mapping)
        if depth <= MOST_DEPTH and (is_map or isinstance(value, list | tuple)):
            if id(value) not in seen:
                seen.add(id(value))
                items = list(value.items() if is_map else enumerate(value))
                stack += [(f"{prefix}.{key}" if prefix else str(key), item, depth + 1) for key, item in reversed(items)]
        else:
            yield prefix, value


def bare(name: str) -> str:
    """Return a name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in TRANSPARENT)


def find_encoder(content: Mapping[Any, Any], where: str) -> Found:
    """Find the one encoder that is meant in what a file holds.

    Of several, an averaged copy is preferred (AVERAGED), then one that no word speaks against (RAW). Raises
    WeightsError where there is none, naming what there is, and where several are left that differ.
    """
    every = list(leaves(content))
    tensors: dict[str, list[tuple[str, Tensor]]] = {}
    for full, value in every:
        if isinstance(value, Tensor):
            tensors.setdefault(bare(full), []).append((full, value))
    roots = _roots(tensors) or _blocks_only(tensors)
    if not roots:
        raise _no_encoder(content, list(tensors), where)
    _refuse_run(tensors, where)
    best = min(map(_rank, roots))
    meant = sorted(root for root in roots if _rank(root) == best)
    inside = [_inside(tensors, root, roots[root].stem, where) for root in meant]
    if any(not _same(inside[0], other) for other in inside[1:]):
        names = ", ".join(repr(root) if root else "no prefix" for root in meant)
        raise WeightsError(
            f"{len(meant)} different encoders are in this file, under {names}",
            where=where,
            todo="save the one that is meant into a file of its own",
        )
    root, encoder = meant[0], inside[0]
    layout = next((known for known in LAYOUTS if _fits(known, encoder)), roots[root])
    taken = {root + name for name in encoder}
    key = root.split(".")[0]
    shared = f"{key}." if isinstance(content.get(key), Mapping) else "\0"
    others = [full for full, value in every if not (isinstance(value, Tensor) and bare(full) in taken)]
    others = [bare(full.removeprefix(shared)) if full.startswith(shared) else full for full in others]
    return Found(layout, root, encoder, others)


def _refuse_run(tensors: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint of this program's own training: its class token is not the one that its blocks get."""
    if any(re.search(r"(^|\.)input_adapter\.", name) for name in tensors):
        raise WeightsError(
            "a checkpoint of a training run, whose class token is not folded with its input adapter yet",
            where=where,
            todo="export it: tec-cache export RUN OUT --checkpoint FILE, then give OUT",
        )


def _roots(tensors: Mapping[str, Any]) -> dict[str, Layout]:
    """Return the prefixes under which a patch embedding and at least one block lie."""
    roots: dict[str, Layout] = {}
    for name in tensors:
        for layout in LAYOUTS:
            root = name.removesuffix(layout.stem)
            if root == name or not (root == "" or root.endswith(".")) or root in roots:
                continue
            block = re.compile(re.escape(root) + layout.block)
            if any(block.match(other) for other in tensors):
                roots[root] = layout
    return roots


def _blocks_only(tensors: Mapping[str, Any]) -> dict[str, Layout]:
    """Return prefixes of blocks without a patch embedding: an encoder with a part missing, which loading will say."""
    roots: dict[str, Layout] = {}
    plain = next(layout for layout in LAYOUTS if layout.name == "timm's")
    for name in tensors:
        match = re.match(rf"((?:[^.]+\.)*?){plain.block}", name)
        if match:
            roots.setdefault(match[1], plain)
    return roots


def _rank(root: str) -> int:
    words = set(re.split(r"[._]", root.lower()))
    return 0 if words & AVERAGED else 2 if words & RAW else 1


def _inside(tensors: Mapping[str, list[tuple[str, Tensor]]], root: str, stem: str, where: str) -> dict[str, Tensor]:
    """Return the tensors under a root by their names below it; what lies outside the stem's wrapper is not of it."""
    wrapper = _wrapper(tensors[root + stem][0][0], root) if root + stem in tensors else ""
    under: dict[str, list[tuple[str, Tensor]]] = {}
    for name, copies in tensors.items():
        kept = [copy for copy in copies if copy[0].startswith(wrapper)] if name.startswith(root) else []
        if kept and not _TRAINING.match(name[len(root) :]):
            under[name[len(root) :]] = kept
    for copies in under.values():
        if len(copies) > 1:
            raise WeightsError(
                f"some names occur twice, with a wrapper's prefix and without: {copies[0][0]} and {copies[1][0]}",
                where=where,
                todo="save one of the two networks into a file of its own",
            )
    return {name: copies[0][1].detach() for name, copies in under.items()}


def _wrapper(full: str, root: str) -> str:
    """Return the beginning of a full name that stands for a root, with the wrappers before and behind it."""
    parts = full.split(".")
    end = 0
    while end < len(parts) and root.startswith(bare(".".join(parts[: end + 1]))):
        end += 1
    return "".join(f"{part}." for part in parts[:end])


def _fits(layout: Layout, tensors: Mapping[str, Tensor]) -> bool:
    return layout.stem in tensors and layout.applies(tensors)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in one
    )


def _no_encoder(content: Mapping[Any, Any], names: list[str], where: str) -> WeightsError:
    """Say what is in the file instead, with the names inside the part that holds most tensors."""
    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(name.split(".")[0] if "." in name else "", []).append(name)
    inner = max(counts.values(), key=len, default=[])
    inside = f"the names inside: {listed(inner, 4)}" if inner else "it holds no tensors"
    return WeightsError(
        "no transformer encoder in this file",
        details=[f"its top-level keys: {listed(map(str, content), 6)}", inside],
        where=where,
        todo=RELEASES,
    )
