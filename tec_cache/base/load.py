"""Load a base model: its architecture, weights that were really read, and nothing left to a guess; and freeze it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tec_cache.base.facts import Fact, Settled, merged_args, settle
from tec_cache.base.folders import check_model_hash
from tec_cache.base.model import FrozenBase, check_supported
from tec_cache.base.source import Given, Source, find_source
from tec_cache.errors import ConfigError, WeightsError
from tec_cache.recipes import BASES, recipe_of
from tec_cache.types import Rows
from tec_cache.weights.files import read_weights, sha256_of_state
from tec_cache.weights.hub import hub_state
from tec_cache.weights.load import fitted, load_strict


def load_base(
    name: str,
    weights: str | Path | None = None,
    *,
    grid: int = 14,
    last_layers: int = 2,
    k: Rows | str | None = "recipe",
    class_target: bool = False,
    given: Given | None = None,
) -> FrozenBase:
    """Load a base model and freeze it.

    name: a name of `recipes.BASES`, `timm:NAME`, a weight file, or a folder (an export, timm's, transformers').
    weights: a weight file in any format that `weights.files` reads; needed where timm's hub has none.
    grid: patches per side; the input is grid * patch pixels, and position embeddings are resampled to it.
    k: rows of attention besides the class token's; "recipe" takes the base's own number, None leaves attention out.
    class_target: also give the class token as a target.
    given: pixel statistics and arguments that no file states.
    Raises ConfigError for an unknown or unsupported base, or for settings that contradict it; WeightsError for weights
    that are missing, do not fit, or belong to another release than the one named.
    """
    given, source = given or Given(), find_source(name, weights)
    loaded = build(source, name, grid, given)
    wanted: Rows = recipe_of(name).k if k == "recipe" else k  # type: ignore[assignment]
    settled = loaded.settled
    identity = {
        "architecture": source.architecture,
        "model_args": settled.model_args,
        "weights_sha256": loaded.sha256,
        "mean": list(settled.mean),
        "std": list(settled.std),
    }
    return FrozenBase(
        loaded.model,
        name=name,
        identity=identity,
        mean=settled.mean,
        std=settled.std,
        last_layers=last_layers,
        k=wanted,
        class_target=class_target,
        facts=(_pixels(loaded.model), *settled.facts),
        given=given,
    )


def random_model(name: str, *, grid: int, seed: int = 0, given: Given | None = None) -> FrozenBase:
    """Return an untrained model of the architecture of a base: the floor that a probe is compared with."""
    given, source = given or Given(), find_source(name, None)
    args = merged_args(source, given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create(source.architecture, args, grid, f"random:{name}")
    identity = {
        "architecture": source.timm_name,
        "model_args": args,
        "weights_sha256": f"random, seed {seed}",
    }
    mean, std = given.mean or source.mean, given.std or source.std
    return FrozenBase(
        model, name=f"random:{name}", identity=identity, mean=mean, std=std, last_layers=1, k=None, given=given
    )


def native_grid(name: str, weights: str | Path | None = None, given: Given | None = None) -> int:
    """Return the patches per side that an architecture is made for, or a folder's model was trained with."""
    source = find_source(name, weights)
    outline_of = outline(source.architecture, merged_args(source, given or Given()), name)
    patch = int(outline_of.patch_embed.patch_size[0])  # type: ignore[union-attr, index]
    if source.native_pixels is not None and source.native_pixels >= patch:
        return source.native_pixels // patch
    return int(outline_of.patch_embed.grid_size[0])  # type: ignore[union-attr, index]


class _Loaded(NamedTuple):
    """A filled model, what was settled of it, and the hash of its weights."""

    model: nn.Module
    settled: Settled
    sha256: str


def build(source: Source, name: str, grid: int, given: Given) -> _Loaded:
    """Create the model and load its weights strictly.

    The hash is taken of the weights as released, before position embeddings are resampled, so one network gives
    one identity on every machine and grid, whether it came through the hub or by hand, and however it was wrapped.
    The class is looked at before anything is downloaded, and the weights' shapes before anything is allocated.
    """
    made = outline(source.architecture, merged_args(source, given), name)
    read = _read(source, name)
    settled = settle(source, read.release, read.num_heads, given, made)
    what = f"{name} ({source.timm_name})"
    state = read.state | {n: value for n, value in read.zeros.items() if n in made.state_dict()}
    fitted(outline(source.architecture, settled.model_args, name, grid), state, what=what)
    model = create(source.architecture, settled.model_args, grid, name)
    load_strict(model, state, what=what)
    return _Loaded(model, settled, sha256_of_state(read.state))


def read_state(source: Source, name: str) -> dict[str, Tensor]:
    """Read the weights of a base under timm's names, from its file or through timm's hub."""
    return _read(source, name).state


class _Read(NamedTuple):
    """Weights under timm's names and what they tell of themselves: see `weights.files.Weights`."""

    state: dict[str, Tensor]
    release: str | None
    num_heads: int | None
    zeros: dict[str, Tensor]


def _read(source: Source, name: str) -> _Read:
    if source.weights is not None:
        check_model_hash(source.weights, source.model_sha256)
        read = source.read or read_weights(source.weights)
        return _Read(read.state, read.release, read.num_heads, read.zeros)
    official = recipe_of(name).official_file
    if name in BASES and not BASES[name].hub:
        raise WeightsError(
            f"timm's hub has no weights for {name}",
            todo=f"download {official} and give it with --base-weights FILE",
        )
    file = official or f"the weights of {source.timm_name}"
    todo = f"download {file} on a connected machine and give it with --base-weights FILE"
    return _Read(hub_state(source.timm_name, todo=todo), None, None, {})


class _LinspaceOnCpu(TorchFunctionMode):
    """timm reads numbers out of a torch.linspace while a model is made, which the meta device cannot give."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.linspace:
            kwargs = {**(kwargs or {}), "device": "cpu"}
        return func(*args, **(kwargs or {}))


def outline(architecture: str, args: dict[str, Any], name: str, grid: int | None = None) -> nn.Module:
    """Create an architecture without memory for its weights (on the "meta" device), of a class that is supported.

    grid: patches per side; the architecture's own where None. Raises ConfigError.
    """
    with torch.device("meta"), _LinspaceOnCpu():
        model = _timm_model(architecture, args, name)
        if grid is not None:
            patch = int(model.patch_embed.patch_size[0])  # type: ignore[union-attr, index]
            model = _timm_model(architecture, args | {"img_size": grid * patch}, name)
    return model


def create(architecture: str, args: dict[str, Any], grid: int, name: str) -> nn.Module:
    """Create an architecture with an input of grid x grid patches, with random weights."""
    patch = int(outline(architecture, args, name).patch_embed.patch_size[0])  # type: ignore[union-attr, index]
    return _timm_model(architecture, args | {"img_size": grid * patch}, name)


def _timm_model(architecture: str, args: dict[str, Any], name: str) -> nn.Module:
    import timm

    passed = {key: value for key, value in args.items() if key != "norm_eps"}
    try:
        model = timm.create_model(architecture, num_classes=0, **passed)
    except (RuntimeError, TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        todo = "check --base-arg, or the arguments in config.json" if args else ""
        raise ConfigError(f"timm cannot create {architecture!r}: {error}", where=name, todo=todo) from error
    check_supported(model)
    if "norm_eps" in args:
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = args["norm_eps"]  # type: ignore[assignment]
    return model


def _pixels(model: nn.Module) -> Fact:
    parts: Any = model
    edge, grid, patch = parts.patch_embed.img_size[0], parts.patch_embed.grid_size[0], parts.patch_embed.patch_size[0]
    tokens = ["class token"] if parts.cls_token is not None else []
    others = int(parts.num_prefix_tokens) - len(tokens)
    tokens += [f"{others} registers"] if others else []
    beside = f", {' and '.join(tokens)}" if tokens else ", no class token"
    return Fact("pixels", f"{edge} x {edge}: {grid} x {grid} patches of {patch}{beside}", "--grid and the patch")
