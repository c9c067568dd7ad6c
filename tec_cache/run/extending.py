"""A run that is lengthened: which steps follow which schedule, and what run.json says of it.

From the step at which a run is lengthened, its schedule is that of a run that was as long from its beginning. After a
finished run the learning rate therefore jumps: a cosine over 300 epochs has ended at `min_lr` where one over 400 is
still at 18 % of its peak. The steps before keep their own schedule, also where an older checkpoint has to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tec_cache.errors import ConfigError
from tec_cache.printable import plural

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler

Extension = dict[str, int]
"""{"from_step", "from_epochs", "to_epochs"}: steps from `from_step` on follow the schedule of `to_epochs`."""


class Lengthened:
    """Several schedules of one optimizer, each from its first step on."""

    def __init__(self, parts: Sequence[tuple[int, Scheduler]]) -> None:
        """parts: first steps and schedules, in the order in which they were asked for: the last that holds counts."""
        self._parts = list(parts)

    def step_update(self, step: int) -> None:
        """Set the learning rates of a step, counted from 0."""
        next(schedule for first, schedule in reversed(self._parts) if first <= step).step_update(step)


def parts_of(extensions: Sequence[Extension]) -> list[tuple[int, int]]:
    """Return first steps with the epochs of the schedule from there on, the run's first schedule first."""
    first = (0, extensions[0]["from_epochs"])
    return [first, *((one["from_step"], one["to_epochs"]) for one in extensions)]


def first_epochs(settings: dict[str, Any]) -> int:
    """Return the epochs that a run was begun with, by its run.json: they are what its checkpoints are known by."""
    made = settings.get("extensions") or []
    return int(made[0]["from_epochs"] if made else settings["config"]["epochs"])


def lengthened(begun: dict[str, Any], epochs: int, step: int, where: str) -> list[Extension]:
    """Return the extensions of a run of settings `begun`, at `step`, once its schedule is one of `epochs` epochs.

    Raises ConfigError where it has done more than that already.
    """
    made, before = list(begun.get("extensions") or []), int(begun["config"]["epochs"])
    if epochs == before:
        return made
    per_epoch = int(begun["total_steps"]) // before
    if epochs * per_epoch < step:
        raise ConfigError(
            f"--epochs {epochs}: this run has done {step / per_epoch:g} {plural(step / per_epoch, 'epoch')} already",
            where=where,
            todo=f"give at least {-(-step // per_epoch)}, or export one of its checkpoints as it is",
        )
    return [*made, {"from_step": step, "from_epochs": before, "to_epochs": epochs}]
