"""run.json: the settings that made a run, checked whenever they are read, and the identity that follows from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tec_cache.cache.identity import fingerprint
from tec_cache.cache.schema import require_shallow
from tec_cache.config import TrainConfig
from tec_cache.documents import MOST_BYTES
from tec_cache.errors import TecCacheError, listed
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.judgement_settings import JudgementSettings
from tec_cache.model_args import MOST_TOKENS, check_model_args
from tec_cache.printable import counted
from tec_cache.run.extending import first_epochs
from tec_cache.run.layout import FORMAT, run_file
from tec_cache.segment.config import SegmentConfig
from tec_cache.store.files import write_atomically
from tec_cache.store.local import read_regular
from tec_cache.types import TargetSpec

MOST_CHANNELS = 2**20
"""Of a feature target; pixels of a patch of 256 have 196,608."""

_JUDGEMENT = {f.name for f in dataclasses.fields(JudgementSettings)}

# What may differ between a run and its resumption: it changes how fast the numbers come, not which.
_FREE = {"out", "device", "precision", "threads", "workers", "micro_batch", "log_every", "save_every", "save_minutes",
         "steps", "on_error", "compile", "checkpointing", "judge_every"}  # fmt: skip
_SINCE = {"save_minutes": 0.0}
"""Settings that this format did not have from its beginning, and what a run without them did."""
_FREE_OF = {
    "pretrain": {"cache", "base_weights", "stage", "stage_bytes", *_JUDGEMENT},
    # what they name is compared by what it holds
    "classify": {"model", "train", "test", "weights", "classes"},
    "segment": {"model", "train", "test", "weights", "classes", "save_predictions"},
}
# What is compared as it was resolved: the targets' identity, spec and tau, and the number of views; the model's.
_RESOLVED_OF = {
    "pretrain": {"views", "target", "online", "pixels", "tau", "k", "normalization", "last_layers", "mean", "std",
                 "base_args"},
    "classify": {"mean", "std", "base_args", "recipe"},
    "segment": {"mean", "std", "base_args", "recipe"},
}  # fmt: skip
CONFIGS: dict[str, type] = {"pretrain": TrainConfig, "classify": FinetuneConfig, "segment": SegmentConfig}
"""Task -> the settings that its program takes."""
PROGRAMS = {"pretrain": "train", "classify": "finetune", "segment": "segment"}
"""Task -> its command."""

# A decoder's settings as the arguments of a model with the same bounds.
_DECODER = {"depth": "decoder_depth", "embed_dim": "decoder_width", "num_heads": "decoder_heads"}


class _Targets(msgspec.Struct):
    """What a pretraining learns from, as far as it is read again."""

    kind: Literal["cached", "online", "pixels"]
    spec: TargetSpec
    tau: float
    weight: float
    goal: str
    """Under which name the student knows them."""
    name: str | None = None


class _Extension(msgspec.Struct, forbid_unknown_fields=True):
    """A change of a run's length: see `run.extending`."""

    from_step: Annotated[int, Meta(ge=0)]
    from_epochs: Annotated[int, Meta(ge=1)]
    to_epochs: Annotated[int, Meta(ge=1)]


class _Init(msgspec.Struct, forbid_unknown_fields=True):
    """What a run began with, where that was another model: see `pipelines.training.warm_start`."""

    kind: Literal["export", "run"]
    step: int
    sha256: str
    taken: list[str]
    random: list[str]


class _Pretrain(msgspec.Struct, forbid_unknown_fields=True):
    """The whole of run.json of a pretraining."""

    format: int
    task: Literal["pretrain"]
    config: dict[str, Any]
    targets: Annotated[list[_Targets], Meta(min_length=1)]
    cache: str
    num_views: int
    groups: list[tuple[int, int]] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    total_steps: int
    notes: dict[str, str] = {}
    init: _Init | None = None
    extensions: list[_Extension] = []


class _Classify(msgspec.Struct, forbid_unknown_fields=True):
    """The whole of run.json of a classification."""

    format: int
    task: Literal["classify"]
    config: dict[str, Any]
    recipe: str
    rule: Literal["mae", "tec"]
    model: dict[str, Any]
    num_classes: int
    classes: list[str] | None
    train: str
    test: str
    total_steps: int
    notes: dict[str, str] = {}


class _Segment(msgspec.Struct, forbid_unknown_fields=True):
    """The whole of run.json of a segmentation."""

    format: int
    task: Literal["segment"]
    config: dict[str, Any]
    recipe: str
    model: dict[str, Any]
    num_classes: int
    classes: list[str] | None
    train: str
    test: str
    total_steps: int
    notes: dict[str, str] = {}


_FIRST = {"config", "targets", "cache", "num_views", "total_steps"}
"""What a run.json of format 1 held, which had no number."""
_WHOLE: dict[str, Any] = {"pretrain": _Pretrain, "classify": _Classify, "segment": _Segment}


def save_settings(run: Path, settings: dict[str, Any]) -> None:
    """Write the resolved settings of a run, in place of those that are there."""
    write_atomically(run_file(run), json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n")


def load_settings(run: Path, task: str | None = None) -> dict[str, Any]:
    """Read the settings of a run; task: which it must be, where that matters.

    Raises TecCacheError where there are none, they are not as `save_settings` writes them or are another task's,
    ConfigError where they ask for a model that is never created.
    """
    path = run_file(run)
    try:
        data = read_regular(path, MOST_BYTES)
    except OSError as error:
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise TecCacheError(
            f"{'there is no run here' if gone else 'run.json cannot be read'}: {error}",
            where=str(run),
            todo="give the folder that tec-cache train --out made",
        ) from error
    try:
        settings: dict[str, Any] = json.loads(data)
        _require_format(settings, path)
        _check(settings)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise TecCacheError(
            f"run.json is damaged, or another version's: {first}",
            where=str(path),
            todo="put back a copy of it; without one, train again with another --out",
        ) from error
    if task is not None and settings["task"] != task:
        raise TecCacheError(
            f"this is a run of tec-cache {PROGRAMS[settings['task']]}, not of {PROGRAMS[task]}",
            where=str(run),
            todo="give the folder of the other one, or another --out",
        )
    config = settings["config"]
    if settings["task"] == "pretrain":
        check_model_args(config["student_args"], str(path))
        decoder = {name: config[of] for name, of in _DECODER.items() if config[of]}
        check_model_args(decoder, f"{path}, the decoder")
    else:
        check_model_args(settings["model"].get("model_args", {}), str(path))
    return settings


def _require_format(settings: Any, path: Path) -> None:
    """Refuse a run of another format by its number: this program cannot know what its fields mean."""
    found = FORMAT
    if isinstance(settings, dict):
        found = settings.get("format", 1 if set(settings) >= _FIRST else FORMAT)
    if found != FORMAT:
        raise TecCacheError(
            f"this run is of format {found!s:.20}, this program's are of {FORMAT}",
            where=str(path),
            todo="go on with the version of tec-cache that made it, or train again with another --out",
        )


def _check(settings: Any) -> None:
    """Raise ValueError unless every field is there, has its type and is within bounds; add what came later."""
    require_shallow(settings)
    task = settings.get("task") if isinstance(settings, dict) else None
    if not isinstance(task, str) or task not in _WHOLE:
        raise ValueError(f"its task is {task!s:.40}")
    if isinstance(settings.get("config"), dict):
        settings["config"] = _SINCE | settings["config"]
    read = msgspec.convert(settings, _WHOLE[task])
    kind = CONFIGS[task]
    fields = {field.name for field in dataclasses.fields(kind)}
    if fields != set(read.config):
        raise ValueError(f"its config differs in the fields {listed(sorted(fields ^ set(read.config)))}")
    msgspec.convert(read.config, kind)
    if not isinstance(read, _Pretrain):
        return
    for targets in read.targets:
        if targets.kind == "cached" and targets.name is None:
            raise ValueError("its target set has no name")
        spec = targets.spec
        rows, columns = spec.grid_shape
        if not (rows >= 1 and columns >= 1 and rows * columns <= MOST_TOKENS and 1 <= spec.channels <= MOST_CHANNELS
                and 0 <= spec.num_heads <= spec.channels):  # fmt: skip
            raise ValueError(
                f"targets of {rows} x {columns} tokens, {counted(spec.channels, 'channel')}, "
                f"{counted(spec.num_heads, 'head')}"
            )


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a run's settings that a resumption must share."""
    task = settings["task"]
    left = _FREE | _FREE_OF[task] | _RESOLVED_OF[task]
    config = {name: value for name, value in settings["config"].items() if name not in left}
    if settings.get("init"):  # compared by the weights, wherever they lie
        config["init"] = settings["init"]["kind"]
    # these settings' consequence, on what it was begun, and how long it was before
    rest = {name: value for name, value in settings.items() if name not in ("total_steps", "notes", "extensions")}
    return rest | {"config": config}


def run_identity(settings: dict[str, Any]) -> str:
    """Return what tells a run from others, as hex: the hash of all that decides its numbers.

    settings: as `load_settings` returns them, so that a number reads the same at the beginning and at the end. A run
    that is lengthened stays the one that it was: its checkpoints are still its own.
    """
    same = comparable(settings)
    if settings.get("extensions"):
        same["config"] = same["config"] | {"epochs": first_epochs(settings)}
    return fingerprint(same)
