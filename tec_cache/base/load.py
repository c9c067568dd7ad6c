"""Find a base model by name, fill it with weights that were really read, and freeze it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tec_cache.base.model import FrozenBase, check_supported
from tec_cache.errors import ConfigError, WeightsError, nearest
from tec_cache.recipes import BASES, IMAGENET_MEAN, IMAGENET_STD, recipe_of, unknown_base
from tec_cache.types import Rows
from tec_cache.weights.files import read_weights, sha256_of_state
from tec_cache.weights.load import load_strict


class Source(NamedTuple):
    """Where a base comes from, before anything is loaded."""

    timm_name: str
    model_args: dict[str, Any]
    weights: Path | None
    """A local file; None where timm's hub has the weights."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_base(
    name: str,
    weights: str | Path | None = None,
    *,
    grid: int = 14,
    last_layers: int = 2,
    k: Rows | str | None = "recipe",
) -> FrozenBase:
    """Load a base model and freeze it.

    name: a name of `recipes.BASES`, `timm:NAME`, a weight file, or a folder made by `tec-cache export`.
    weights: a weight file in any format that `weights.files` reads; needed where timm's hub has none.
    grid: patches per side; the input is grid * patch pixels, position embeddings are resampled to it.
    k: rows of attention beside the class token's; "recipe" takes the base's own, None leaves attention out.
    Raises ConfigError for an unknown or unsupported base, WeightsError for weights that are missing or unfit.
    """
    source = find_source(name, weights)
    model, sha256 = build(source, name, grid)
    wanted: Rows = recipe_of(name).k if k == "recipe" else k  # type: ignore[assignment]
    architecture = source.timm_name.split(".")[0]
    identity = {
        "architecture": architecture,
        "model_args": source.model_args,
        "weights_sha256": sha256,
        "mean": list(source.mean),
        "std": list(source.std),
    }
    return FrozenBase(
        model,
        name=name,
        identity=identity,
        mean=source.mean,
        std=source.std,
        last_layers=last_layers,
        k=wanted,
    )


def random_model(name: str, *, grid: int, seed: int = 0) -> FrozenBase:
    """Return an untrained model of the architecture of a base: the floor that a probe is compared with."""
    source = find_source(name, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _create(source, grid, f"random:{name}")
    identity = {
        "architecture": source.timm_name,
        "model_args": source.model_args,
        "weights_sha256": f"random, seed {seed}",
    }
    return FrozenBase(
        model,
        name=f"random:{name}",
        identity=identity,
        mean=source.mean,
        std=source.std,
        last_layers=1,
        k=None,
    )


def native_grid(name: str, weights: str | Path | None = None) -> int:
    """Return the patches per side that an architecture is made for, or an export was trained with."""
    source = find_source(name, weights)
    import timm

    args = source.model_args
    config_file = Path(name) / "config.json"
    if name not in BASES and config_file.is_file():
        args = args | {"img_size": json.loads(config_file.read_text())["model_args"]["img_size"]}
    model = timm.create_model(source.timm_name.split(".")[0], num_classes=0, **args)
    check_supported(model)
    return int(model.patch_embed.grid_size[0])  # type: ignore[union-attr, index]


def find_source(name: str, weights: str | Path | None) -> Source:
    """Resolve a base's name to an architecture, pixel statistics and a place of weights."""
    file = Path(weights) if weights is not None else None
    if name in BASES:
        recipe = BASES[name]
        mean, std = pixel_statistics(recipe.timm_name) if recipe.hub else (IMAGENET_MEAN, IMAGENET_STD)
        return Source(recipe.timm_name, {}, file, mean, std)
    if name.startswith("timm:"):
        timm_name = name.removeprefix("timm:")
        mean, std = pixel_statistics(timm_name)
        return Source(timm_name, {}, file, mean, std)
    path = Path(name)
    if path.is_dir():
        return _exported(path, file)
    if path.is_file():
        return _bare_file(path, file)
    raise unknown_base(name)


def pixel_statistics(timm_name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the pixel mean and deviation that timm's configuration states for a model."""
    import timm

    try:
        config = timm.models.get_pretrained_cfg(timm_name)
    except RuntimeError:
        config = None
    if config is None:
        known = timm.list_models() + timm.list_models(pretrained=True)
        raise ConfigError(
            f"timm {timm.__version__} knows no model {timm_name!r}{nearest(timm_name, known)}",
            todo="see timm.list_models('vit*')",
        )
    return _three(config.mean), _three(config.std)


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _exported(folder: Path, weights: Path | None) -> Source:
    """Read config.json of an export (timm's local-dir layout)."""
    config_file = folder / "config.json"
    try:
        config = json.loads(config_file.read_text())
        architecture, args = config["architecture"], config["model_args"]
        cfg = config["pretrained_cfg"]
        mean, std = _three(cfg["mean"]), _three(cfg["std"])
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"not a folder made by tec-cache export: {error}",
            where=str(config_file),
            todo="give the OUT folder of tec-cache export RUN OUT",
        ) from error
    args = {key: value for key, value in args.items() if key not in ("img_size", "num_classes")}
    return Source(architecture, args, weights or folder / "model.safetensors", mean, std)


# A weight file alone does not say how many heads it has; these are the widths of the field's plain ViTs.
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}


def _bare_file(path: Path, weights: Path | None) -> Source:
    """Guess the architecture of a bare weight file from its shapes, or refuse."""
    if weights is not None:
        raise ConfigError(
            "a base that is itself a file takes no --base-weights",
            where=str(path),
            todo="name the architecture: --base timm:NAME --base-weights FILE",
        )
    read = read_weights(path)
    state = read.state
    patch = state.get("patch_embed.proj.weight")
    size = _SIZES.get(int(patch.shape[0])) if patch is not None and patch.ndim == 4 else None
    # MoCo v3's ViT-S has 12 heads, everybody else's 6: its shapes fit and its attention would be wrong
    other_heads = read.format == "mocov3" and size == "small"
    if patch is None or size is None or "cls_token" not in state or other_heads:
        raise WeightsError(
            "the architecture cannot be told from this file alone",
            where=str(path),
            todo="name it: --base timm:NAME --base-weights FILE",
        )
    edge = int(patch.shape[-1])
    if "blocks.0.ls1.gamma" in state:
        registers = "reg4_" if "reg_token" in state else ""
        timm_name = f"vit_{size}_patch14_{registers}dinov2"
    else:
        timm_name = f"vit_{size}_patch{edge}_224"
    import timm

    if not timm.is_model(timm_name):
        raise WeightsError(
            f"no plain vision transformer of width {patch.shape[0]} and patch {edge} is known",
            where=str(path),
            todo="name it: --base timm:NAME --base-weights FILE",
        )
    return Source(timm_name, {}, path, IMAGENET_MEAN, IMAGENET_STD)


def build(source: Source, name: str, grid: int) -> tuple[nn.Module, str]:
    """Create the model, load its weights strictly, and return it with the weights' SHA-256.

    The hash is taken of the weights as released, before position embeddings are resampled, so one file gives
    one identity on every machine and grid, whether it came through the hub or by hand.
    """
    model = _create(source, grid, name)  # first, so that nothing is downloaded for a class that is refused
    state = read_state(source, name)
    load_strict(model, state, what=f"{name} ({source.timm_name})")
    return model, sha256_of_state(state)


def read_state(source: Source, name: str) -> dict[str, torch.Tensor]:
    """Read the weights of a base under timm's names, from its file or through timm's hub."""
    if source.weights is not None:
        return read_weights(source.weights).state
    if name in BASES and not BASES[name].hub:
        raise WeightsError(
            f"timm's hub has no weights for {name}",
            todo=f"download {BASES[name].official_file} and give it with --base-weights FILE",
        )
    return _hub_state(source.timm_name, name)


def _create(source: Source, grid: int, name: str) -> nn.Module:
    """Create the architecture with an input of grid x grid patches."""
    import timm

    architecture = source.timm_name.split(".")[0]
    try:
        probe = timm.create_model(architecture, num_classes=0, **source.model_args)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(f"timm cannot create {architecture!r}: {error}", where=name) from error
    check_supported(probe)
    patch = int(probe.patch_embed.patch_size[0])  # type: ignore[union-attr, index]
    args = source.model_args | {"img_size": grid * patch}
    model = timm.create_model(architecture, num_classes=0, **args)
    check_supported(model)
    return model


def _hub_state(timm_name: str, name: str) -> dict[str, torch.Tensor]:
    """Download the weights through timm's hub; offline, say which file to give instead."""
    import timm

    try:
        model = timm.create_model(timm_name, pretrained=True, num_classes=0)
    except Exception as error:
        # huggingface_hub and urllib raise a dozen kinds of error for one fact: the weights are not here
        official = recipe_of(name).official_file
        file = official or f"the weights of {timm_name}"
        raise WeightsError(
            f"the weights of {name} could not be had from timm's hub ({type(error).__name__})",
            where=timm_name,
            todo=f"download {file} on a connected machine and give it with --base-weights FILE",
        ) from error
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
