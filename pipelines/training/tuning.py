"""What the programs that tune an encoder have in common."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.training.running import Ran
from tec_cache.device import Compute, default_workers
from tec_cache.distributed import Ranks, gathered
from tec_cache.finetune.classifier import LoadedEncoder
from tec_cache.labelled import PhotoIndex
from tec_cache.model_card import bases_of, tuned
from tec_cache.run.layout import FORMAT
from tec_cache.run.loop import LoopSummary
from tec_cache.run.metrics import read_metrics
from tec_cache.tuning_settings import TuningSettings
from tec_cache.urls import without_secrets


@dataclass(kw_only=True)
class TuningSummary(LoopSummary):
    """What a tuning did, and the numbers that it reached; shares from 0 to 1."""

    model: str
    recipe: str
    why: str
    """Why it is this recipe."""
    tune: str
    settings: dict[str, Any]
    """Of the recipe, as they were resolved."""
    train_images: int
    test_images: int
    judged_on: str
    classes: int
    class_names: list[str] | None
    """In the order of their numbers; None where they are numbers only."""
    remarks: list[str]
    """What was assumed of the classes, and what of the photos was left out."""
    left_out: int
    """Photos of each epoch that filled no batch; others in each epoch."""
    last: dict[str, float]
    """Scores after the last epoch."""
    best: dict[str, float]
    """Those, and the step, of the highest main score of all: chosen by looking at the photos that are judged."""
    damaged: list[str]
    foreign: list[str] = field(default_factory=list)
    """What lies in the run's folder beside the run."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Reached:
    """The scores of a run's judgements."""

    last: dict[str, float]
    best: dict[str, float]

    @classmethod
    def of(cls, run: Path, score: str) -> Reached:
        """Read them from metrics.jsonl; score: the main one, the higher the better. Empty where there are none."""
        lines = [line for line in read_metrics(run) if score in line]
        if not lines:
            return cls({}, {})
        return cls(_scores(lines[-1]), _scores(max(lines, key=lambda line: float(line[score]))))


def _scores(line: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in line.items() if name == "step" or name.startswith("test_")}


def shared_summary(config: TuningSettings, ran: Ran[Any], score: str, shown: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a summary that follow from the run alone. score: the main one. shown: settings to tell."""
    learned, judged = ran.task.learned, ran.task.judged
    written = ran.loop.ranks.main and not ran.dry_run
    reached = Reached.of(Path(config.out), score) if written else Reached({}, {})
    return {
        **vars(ran.done),
        "settings": {name: getattr(config, name) for name in shown},
        "left_out": learned.left_out,
        "last": reached.last,
        "best": reached.best,
        "damaged": sorted(set().union(*gathered(learned.damaged | judged.damaged, ran.loop.ranks))),
        "foreign": ran.foreign,
    }


def shared_settings(task: str, config: TuningSettings, encoder: LoadedEncoder) -> dict[str, Any]:
    """Return the part of run.json that every tuning has: format, task, config and the model that it began with.

    What that model's bases were is a note, for the card: a run is the same without it.
    """
    places: dict[str, Any] = {n: without_secrets(getattr(config, n)) for n in ("train", "test") if getattr(config, n)}
    made_of = {name: value for name, value in encoder.made_of.items() if name not in ("name", "export")}
    return {
        "format": FORMAT,
        "task": task,
        "config": json.loads(json.dumps(asdict(replace(config, **places)))),  # as it will be read again
        "model": made_of
        | {"mean": list(encoder.mean), "std": list(encoder.std), "input_size": encoder.input_size}
        | {"adapters": encoder.input_adapter_state is not None},
        "notes": {"bases": json.dumps(bases_of(encoder.made_of.get("export") or tuned(config.model)))},
    }


def reader_settings(config: TuningSettings, compute: Compute, ranks: Ranks) -> dict[str, Any]:
    """Return the arguments that all readers of a program share."""
    return {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "workers": config.workers or default_workers(compute.device, ranks.local_world_size),
        "pin_memory": compute.device.type == "cuda",
        "on_error": config.on_error,
    }


def said_of(index: PhotoIndex) -> list[str]:
    """Say what of an input was left out."""
    said = [f"without a {index.ANNOTATION}: {index.unlabelled}"] if index.unlabelled else []
    said += [f"not usable: {index.unusable}"] if index.unusable else []
    return said + [f"passed over: {kind} ({count:,})" for kind, count in index.passed_over.items()]
