"""Disk and hours of all rounds, before they begin: one of them planned with an untrained model, times what is left."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.chaining.chain import Chain, round_name
from pipelines.chaining.journal import Journal
from pipelines.plan import plan
from pipelines.planning.result import HOUR, MARGIN
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.config import PlanConfig, TrainConfig
from tec_cache.run.checkpoint import KEEP
from tec_cache.run.export import write_export
from tec_cache.student.model import Student, create_student, student_options
from tec_cache.types import TargetSpec

STATES = 3
"""Numbers that a checkpoint holds of each weight: itself and AdamW's two moments."""
FLOAT = 4


@dataclass(frozen=True)
class Estimate:
    """What the rounds that are left will take."""

    trainings: int
    extractions: int
    hours_training: float
    """Of one."""
    hours_extraction: float
    """Of one."""
    bytes_set: float
    """Of one target set."""
    sets_at_once: int
    """That the cache holds when it holds most of them."""
    bytes_runs: float
    """Of all runs and exports that are not there yet."""
    free_cache: int | None
    free_out: int
    one_disk: bool
    """Whether cache and runs lie on the same disk."""

    @property
    def hours(self) -> float:
        """Of all that is left."""
        return self.trainings * self.hours_training + self.extractions * self.hours_extraction

    @property
    def bytes_sets(self) -> float:
        """Of the target sets that are there at once."""
        return self.sets_at_once * self.bytes_set

    @property
    def fits(self) -> bool | None:
        """Whether there is room, with the plan's own error to spare; None where nobody can say."""
        both = self.bytes_runs + (self.bytes_sets if self.one_disk else 0)
        if both * MARGIN > self.free_out:
            return False
        return None if self.free_cache is None else self.bytes_sets * MARGIN <= self.free_cache

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and what follows from them, as plain values."""
        return asdict(self) | {"hours": self.hours, "bytes_sets": self.bytes_sets, "fits": self.fits}


def estimate(chain: Chain, journal: Journal, *, quiet: bool) -> Estimate:
    """Measure a little of one extraction and one training, with random weights in place of a trained model's.

    An untrained model computes as fast as a trained one; its targets take other bytes, rather more than fewer, since
    what it says of a photo is less smooth. Nothing stays of it, neither in the cache nor beside it.
    """
    config, cache = chain.config, open_cache(chain.config.train.cache)
    student = _student(config.train, cache)
    with tempfile.TemporaryDirectory(prefix="tec-cache-rounds-") as folder:
        model = {"encoder_name": config.train.student, "model_args": config.train.student_args}
        write_export(student, Path(folder) / "export", config={"settings": {}, "step": 0}, **model)  # type: ignore[arg-type]
        base, name = str(Path(folder) / "export"), f"{config.set_prefix}-plan"
        extract = replace(config.extract, base=base, name=name, views=chain.num_views)
        train = replace(config.train, out="(none)", views=None)
        found = plan(PlanConfig(extract=extract, train=train, seconds=config.seconds), quiet=quiet)
    todo = [number for number in range(config.rounds) if f"{round_name(number)} train" not in journal.done]
    sets = [number for number in range(1, config.rounds) if f"{round_name(number)} extract" not in journal.done]
    there = sum(one.target is not None and not one.removed for one in journal.rounds)
    out = next(path for path in (chain.folder.absolute(), *chain.folder.absolute().parents) if path.is_dir())
    place = cache.store.folder
    return Estimate(
        trainings=len(todo),
        extractions=len(sets),
        hours_training=found.epoch_seconds["cached"] * config.train.epochs / HOUR,
        hours_extraction=found.total_seconds / HOUR,
        bytes_set=found.bytes_targets,
        sets_at_once=max(0, min(len(sets), config.keep + 1 - there)),
        bytes_runs=len(todo) * _bytes_of_a_round(student),
        free_cache=found.free,
        free_out=shutil.disk_usage(out).free,
        one_disk=place is not None and place.stat().st_dev == out.stat().st_dev,
    )


def _student(train: TrainConfig, cache: Cache) -> Student:
    """Make a student as every round trains it; what it would learn does not matter here."""
    spec = TargetSpec(grid=cache.grid, channels=1, num_heads=0, k=None, normalization="feature")
    return create_student(train.student, targets=spec, model_args=train.student_args, **student_options(vars(train)))


def _bytes_of_a_round(student: Student) -> float:
    """Return the bytes of a run's checkpoints, the one that is being written among them, and of its export."""
    weights = sum(p.numel() for p in student.parameters())
    return float(FLOAT * weights * ((KEEP + 1) * STATES + 1))
