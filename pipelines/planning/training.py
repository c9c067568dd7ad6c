"""A short training on a small finished cache: the student's step, and what its targets cost either way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from pipelines.extraction.prepare_targets import TargetJob
from pipelines.planning.extract import settled, timed
from pipelines.train import prepare_student
from pipelines.training.target_sources import OnlineTargets
from tec_cache.cache.reader import Cache
from tec_cache.config import TrainConfig
from tec_cache.device import Compute, available_cores, default_threads, default_workers, resolve_compute
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError
from tec_cache.flops import BACKWARD, base_macs, student_macs
from tec_cache.loader import Batch, Loader
from tec_cache.printable import counted
from tec_cache.progress import Progress
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.run.feed import on_device
from tec_cache.run.loop import Loop
from tec_cache.run.micro_batches import fitting
from tec_cache.student.masking import num_visible_patches
from tec_cache.student.model import Student
from tec_cache.tasks.pretrain import MOST_AT_ONCE, MaskedBatch, Pretrain
from tec_cache.tasks.targets import TargetSource
from tec_cache.types import Targets

MOST_MICRO = 256
"""Views of a measured micro-batch, at most."""
READS = 0.03
"""Share of the seconds in which the loader is tried, for cached and for online training each."""


@dataclass(frozen=True)
class TrainingCosts:
    """Seconds of one view in training, and its multiply-accumulates."""

    micro_batch: int
    """Views that were measured at once."""
    student: float
    """Forward and backward."""
    update: float
    """Of the optimizer, once a step."""
    decode: float
    """Of stored targets."""
    base: float
    """Of the base in the loop."""
    load_cached: float
    load_online: float
    """Reading and decoding crops (and targets), with all of the loader's threads."""
    overlaps: bool
    """Whether the loader works beside the device; on a CPU it takes its share of the cores."""
    share: float
    """Share of the cores that the loader takes."""
    base_macs: int
    step_macs: int
    """Of the student, forward and backward."""

    def per_view(self, batch_size: int) -> dict[str, float]:
        """Return the seconds of one view, cached and online."""
        found = {}
        for name, targets, load in (
            ("cached", self.decode, self.load_cached),
            ("online", self.base, self.load_online),
        ):
            step = self.student + targets + self.update / batch_size
            found[name] = max(step, load) if self.overlaps else step + load * self.share
        return found

    def bottleneck(self, batch_size: int) -> dict[str, str]:
        """Name what takes most of the time of a view, cached and online."""
        student = self.student + self.update / batch_size
        share = 1.0 if self.overlaps else self.share
        cached = {"student": student, "decoding targets": self.decode, "loader": self.load_cached * share}
        online = {"student": student, "base": self.base, "loader": self.load_online * share}
        return {n: max(parts, key=parts.__getitem__) for n, parts in (("cached", cached), ("online", online))}


@dataclass
class Prepared:
    """A student and the two sources of its targets."""

    config: TrainConfig
    compute: Compute
    cached: TargetSource
    student: Student


@dataclass
class _Ready:
    """Targets that are there already."""

    ready: Targets
    spec: Any
    tau: float
    weight: float = 1.0
    stored: Any = None
    pixel_size: int | None = None

    def targets(self, batch: Batch, images: torch.Tensor) -> Targets:
        return self.ready

    def identity(self) -> dict[str, Any]:
        return {}


def prepare_training(config: TrainConfig, cache: Cache) -> Prepared:
    """Make the student for the targets of a scratch cache; refuses what `train` would refuse."""
    compute = resolve_compute(config.device, config.precision)
    config = replace(config, cache=cache.store.address, target=(), online=(), views=1)
    if config.micro_batch is None and compute.device.type != "cpu":
        config = replace(config, micro_batch=fitting(config, Ranks(), MOST_AT_ONCE))
    micro = config.micro_batch or config.batch_size
    if config.batch_size % -(-config.batch_size // micro):
        raise ConfigError(
            f"a batch of {counted(config.batch_size, 'view')} does not divide into micro-batches of {micro}",
            todo=f"use a --micro-batch that divides {config.batch_size}",
        )
    sources, student = prepare_student(config, cache, compute)
    (source,) = sources.values()  # of the scratch cache's one target set
    return Prepared(config, compute, source, student)


def measure_training(made: Prepared, cache: Cache, job: TargetJob, *, seconds: float, quiet: bool) -> TrainingCosts:
    """Run steps of the student on the one unit of a small cache."""
    config, compute = made.config, made.compute
    if compute.device.type == "cpu":
        torch.set_num_threads(config.threads or default_threads(1))
    count = len(cache.views_record(cache.view_units[0]).keys)
    steps = -(-config.batch_size // (config.micro_batch or config.batch_size))
    most = min(config.batch_size // steps, count, MOST_MICRO)
    # a loader knows its own target set, so what prepare_student opened before there was a unit is opened again
    made.cached.stored = cache[job.name]
    online = OnlineTargets(job.base, job.spec, made.cached.tau, compute)
    one_step = replace(config, batch_size=count)
    task = Pretrain(one_step, cache, {"": made.cached}, made.student, compute, Ranks())
    loop = Loop(task, one_step, compute, Ranks())
    workers = config.workers or default_workers(compute.device, 1)
    load_cached, load_online = (
        _reading(cache, source, task.size, workers, READS * seconds) for source in (made.cached, online)
    )
    batch = _all_rows(cache, made.cached, {task.size, job.base.input_size}, compute.device)
    with Progress("plan: training", quiet=quiet) as progress, torch.random.fork_rng(devices=[]):
        clock = _Steps(task, loop, made.cached, online, batch)
        clock.student(min(2, most))
        per_view = settled(clock.student, most, compute.device)
        # a student's step three times, decoding and the base in the loop twice
        micro = max(1, min(most, int(seconds / 6 / per_view)))
        progress.expect(3 * micro)
        times = []
        for _ in range(3):
            times.append(clock.student(micro))
            progress.advance(micro)
        decode = min(clock.targets(made.cached, micro) for _ in range(2))
        base = min(clock.targets(online, micro) for _ in range(2))
        clock.update()
        update = clock.update()
    visible = num_visible_patches(job.spec.num_tokens, config.mask_ratio)
    return TrainingCosts(
        micro_batch=micro,
        student=median(times) / micro,
        update=update,
        decode=decode / micro,
        base=base / micro,
        load_cached=load_cached,
        load_online=load_online,
        overlaps=compute.device.type != "cpu",
        share=min(workers, available_cores()) / available_cores(),
        base_macs=base_macs(job.base),
        step_macs=(1 + BACKWARD) * student_macs(made.student, visible),
    )


class _Steps:
    """The parts of a training step, one by one."""

    def __init__(
        self, task: Pretrain, loop: Loop[MaskedBatch], cached: TargetSource, online: TargetSource, batch: Batch
    ) -> None:
        self.task, self.loop, self.cached, self.online, self.batch = task, loop, cached, online, batch

    def student(self, count: int) -> float:
        """Seconds of forward and backward on some rows, their targets being there."""
        task, part = self.task, self.batch.rows(count)
        ready = self._targets(self.cached, part)
        task.sources = {"": _Ready(ready, self.cached.spec, self.cached.tau)}
        self.loop.optimizer.zero_grad(set_to_none=True)
        masked = task.masked(part).to(self.loop.compute.device)
        return timed(lambda: self.loop.losses(masked)["loss"].backward())[1]

    def targets(self, source: TargetSource, count: int) -> float:
        """Seconds of getting the targets of some rows."""
        part = self.batch.rows(count)
        return timed(lambda: self._targets(source, part))[1]

    def update(self) -> float:
        """Seconds of the optimizer."""
        step: Callable[[], Any] = self.loop.optimizer.step
        return timed(step)[1]

    def _targets(self, source: TargetSource, part: Batch) -> Targets:
        images = part.images(self.task.size, IMAGENET_MEAN, IMAGENET_STD)
        with self.loop.compute.autocast():
            return source.targets(part, images)


def _loader(cache: Cache, source: TargetSource, sizes: set[int], batch_size: int, workers: int) -> Loader[Batch]:
    stored = [source.stored] if source.stored is not None else []
    return Loader(cache, stored, batch_size=batch_size, pixel_sizes=tuple(sorted(sizes)), workers=workers)


def _all_rows(cache: Cache, source: TargetSource, sizes: set[int], device: torch.device) -> Batch:
    """Load the whole sample as one batch."""
    count = len(cache.views_record(cache.view_units[0]).keys)
    (batch,) = on_device(_loader(cache, source, sizes, count, 1).batches(0, 1), device)
    return batch


def _reading(cache: Cache, source: TargetSource, size: int, workers: int, seconds: float) -> float:
    """Seconds of reading one view with all threads of the loader; each block is read once, as in a real epoch."""
    count = len(cache.views_record(cache.view_units[0]).keys)
    sizes = {size} | ({source.pixel_size} if source.pixel_size else set())
    rows, spent = 0, 0.0
    while not rows or spent < seconds:
        loader = _loader(cache, source, sizes, max(1, count // (4 * workers)), workers)
        begin = time.monotonic()
        for batch in loader.batches(0, loader.steps_per_epoch):
            rows += len(batch.labels)
        spent += time.monotonic() - begin
    return spent / rows
