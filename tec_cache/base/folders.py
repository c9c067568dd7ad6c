"""Folders with a model in them: an export of this program, a folder of timm's hub, one of the transformers library.

Whoever made a folder chose what stands in it, so nothing reaches timm but an architecture that it knows and arguments
that `model_args` allows, and no weight file but those of the names below is opened.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tec_cache.base import transformers_config
from tec_cache.base.statistics import three
from tec_cache.errors import ConfigError, WeightsError, nearest
from tec_cache.model_args import BASE_ARGS, check_model_args
from tec_cache.recipes import of_generation
from tec_cache.types import Colours
from tec_cache.weights.content import read_json

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth",
)
"""Names of the weights in a folder, in the order in which they are looked for."""

NOT_OF_A_BASE = ("img_size", "num_classes", "in_chans", "drop_rate")
"""Arguments that belong to a task; the size of the input follows from the grid."""


@dataclass(frozen=True)
class Folder:
    """What a folder says of the model in it."""

    timm_name: str
    model_args: dict[str, Any]
    weights: Path
    statistics: tuple[Colours, Colours] | None
    origin: str
    """Which file states mean and deviation."""
    says: str
    """Which file states the architecture's arguments."""
    release: str | None = None
    model_sha256: str | None = None
    native_pixels: int | None = None


def read_folder(folder: Path) -> Folder:
    """Read what a folder with a config.json says. Raises WeightsError or ConfigError naming the file."""
    file = folder / "config.json"
    if not file.is_file():
        raise WeightsError(
            "this folder has no config.json, so nothing says what model is in it",
            where=str(folder),
            todo="give a folder made by tec-cache export, of timm's hub or of transformers; or the weight file itself",
        )
    config = read_json(file)
    if "architecture" in config:
        return _of_timm(folder, config)
    if "model_type" in config:
        found = transformers_config.read(folder, config)
        statistics = found.statistics
        return Folder(
            found.timm_name,
            check_model_args(found.model_args, str(file), BASE_ARGS),
            weights_in(folder),
            statistics,
            found.origin,
            says="config.json",
            release=found.release,
            native_pixels=found.pixels,
        )
    raise WeightsError(
        "neither an architecture of timm nor a model_type of transformers is named",
        where=str(file),
        todo="give a folder made by tec-cache export, of timm's hub or of transformers; or the weight file itself",
    )


def weights_in(folder: Path) -> Path:
    """Return the weight file of a folder: the first of FILES that is there, or the first of them."""
    return next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])


def _of_timm(folder: Path, config: dict[str, Any]) -> Folder:
    """Read config.json of timm's layout, which exports share; `model_args` may be left out."""
    where, architecture = str(folder / "config.json"), config["architecture"]
    _check_architecture(architecture, where)
    args = check_model_args(config.get("model_args") or {}, where, BASE_ARGS)
    cfg = config.get("pretrained_cfg", config)
    if not isinstance(cfg, dict):
        raise WeightsError(f"pretrained_cfg is a {type(cfg).__name__}, not an object", where=where)
    statistics = None
    if "mean" in cfg or "std" in cfg:
        statistics = three(cfg.get("mean"), "mean", where), three(cfg.get("std"), "std", where, positive=True)
    ours = config.get("tec_cache")
    digest = ours.get("model_sha256") if isinstance(ours, dict) else None
    return Folder(
        architecture,
        {name: value for name, value in args.items() if name not in NOT_OF_A_BASE},
        weights_in(folder),
        statistics,
        origin="config.json",
        says="config.json" if args else "",
        model_sha256=None if digest is None else str(digest),
        native_pixels=args.get("img_size") or _edge(cfg),
    )


def _check_architecture(architecture: Any, where: str) -> None:
    """Allow names of timm's own models only: a place such as hf-hub: would bring somebody else's configuration."""
    import timm

    if not isinstance(architecture, str) or not timm.is_model(architecture):
        shown = str(architecture)[:80]
        near = nearest(shown, of_generation(shown, timm.list_models("vit*")))
        raise ConfigError(
            f"timm {timm.__version__} knows no model {shown!r}{near}",
            where=where,
            todo="see timm.list_models('vit*')",
        )


def _edge(cfg: dict[str, Any]) -> int | None:
    """Return the edge of the images that a timm configuration states, where it is a square one."""
    size = cfg.get("input_size")
    if not isinstance(size, list) or len(size) != 3 or size[1] != size[2]:
        return None
    return size[1] if type(size[1]) is int and 1 <= size[1] <= 4096 else None


def check_model_hash(weights: Path, expected: str | None) -> None:
    """Refuse weights that are not those that the configuration beside them was written for.

    An export that was interrupted, or whose files were mixed with another's, may still load: shapes do not tell.
    expected: SHA-256 of the file's bytes, None where nothing was stated. Raises WeightsError.
    """
    if expected is None:
        return
    if not weights.is_file():
        raise WeightsError("no such weight file", where=str(weights), todo="export again")
    with weights.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise WeightsError(
            "config.json was written for other weights than those beside it",
            details=[f"SHA-256 {found[:16]}..., stated {expected[:16]}..."],
            where=str(weights),
            todo="run tec-cache export again, with --overwrite",
        )
