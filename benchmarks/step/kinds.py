"""Trainings of one student on the same views that differ in where targets come from, and the seconds of their steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.train import prepare_student
from tec_cache.cache.opening import open_cache
from tec_cache.config import TrainConfig
from tec_cache.device import resolve_compute
from tec_cache.distributed import Ranks
from tec_cache.loader import Batch
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.run.feed import on_device
from tec_cache.run.loop import Loop
from tec_cache.tasks.pretrain import MaskedBatch, Pretrain
from tec_cache.types import Targets

WARM_UP = 4
"""Steps of a stretch that are not timed: more than the loader has ready when the stretch begins."""


@dataclass(frozen=True)
class Setting:
    """A student, the cache it learns from, and how it is trained.

    more: further fields of TrainConfig, `online` and `base_weights` among them.
    """

    cache: str
    run: Path
    student: str
    batch_size: int
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> TrainConfig:
        """The training's settings: one that does not end while it is measured."""
        common = {name: getattr(self, name) for name in ("cache", "student", "batch_size", "device", "precision")}
        return TrainConfig(out=str(self.run), compile=self.compile, epochs=10_000, **common, **self.more)


class Kind(NamedTuple):
    """One kind of training, and what does a step of it and waits for none."""

    task: Pretrain
    loop: Loop[MaskedBatch]
    step: Callable[[], None]


def three_kinds(setting: Setting, online: Mapping[str, Any]) -> dict[str, Kind]:
    """Return the limit (images and targets on the device), the cached training, and one with the base in the loop.

    online: fields of TrainConfig that put it there.
    """
    return {
        "limit": kind(setting, ready=True),
        "cached": kind(setting),
        "online": kind(replace(setting, more={**setting.more, **online})),
    }


def kind(setting: Setting, *, ready: bool = False) -> Kind:
    """Prepare a training. ready: let its images and targets be on the device already."""
    config = setting.config
    compute = resolve_compute(config.device, config.precision)
    opened = open_cache(config.cache)
    sources, student = prepare_student(config, opened, compute)
    task = Pretrain(config, opened, sources, student, compute, Ranks())
    loop = Loop(task, config, compute, Ranks())
    batches = on_device(task.batches(0, loop.total_steps), compute.device)
    if ready:
        make_ready(task, loop, next(batches))
        batches.close()
    return Kind(task, loop, lambda: loop.train_step(batches, check=False))


def make_ready(task: Pretrain, loop: Loop[MaskedBatch], batch: MaskedBatch) -> None:
    """Let a training use one batch for ever, its images and targets made already."""
    images = batch.views.images(task.size, IMAGENET_MEAN, IMAGENET_STD)
    (source,) = task.sources.values()
    targets = source.targets(batch.views, images)

    class Ready(Batch):
        def images(self, *_: Any) -> torch.Tensor:
            return images

    def ready_targets(*_: Any) -> Targets:
        return targets

    there = MaskedBatch(Ready(**vars(batch.views)), batch.noise)
    loop.next_batch = lambda _: there  # type: ignore[method-assign]
    source.targets = ready_targets  # type: ignore[method-assign]


def measure(kinds: Mapping[str, Kind], steps: int, rounds: int) -> list[dict[str, float]]:
    """Return the seconds of a step of each kind in each round."""
    found = []
    for _ in range(rounds):
        # a stretch of one kind at a time: the loader of another one must not refill its queue meanwhile
        found.append({name: stretch(one, steps) for name, one in kinds.items()})
    return found


def stretch(kind: Kind, steps: int) -> float:
    """Return the seconds of a step. On a GPU steps are queued as in a training, and waited for at the end only.

    On a CPU each step is timed, and it is the median: one that was disturbed does not count.
    """
    device = kind.loop.compute.device
    for _ in range(WARM_UP):
        kind.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            kind.step()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / steps
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        kind.step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
