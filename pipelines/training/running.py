"""How every program of the training loop begins, goes on and ends a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from tec_cache import __version__
from tec_cache.device import Compute, default_threads, device_notes, resolve_compute
from tec_cache.distributed import Ranks
from tec_cache.loop_settings import ComputeSettings, LoopSettings
from tec_cache.run.beginning import begin_run, find_start
from tec_cache.run.extending import Extension
from tec_cache.run.folder import begun_run, foreign_files
from tec_cache.run.loop import Loop, LoopSummary
from tec_cache.run.micro_batches import fitting
from tec_cache.tasks.task import Task

T = TypeVar("T", bound=Task[Any])
C = TypeVar("C", bound=LoopSettings)


@dataclass(frozen=True)
class Ran(Generic[T]):
    """A task whose loop has run, or would."""

    task: T
    loop: Loop[Any]
    done: LoopSummary
    dry_run: bool
    foreign: list[str]
    """What lies in the run's folder beside the run: nothing of it is ever read or removed."""
    extensions: list[Extension]
    """How the run was lengthened."""


def prepared_compute(config: ComputeSettings, ranks: Ranks) -> Compute:
    """Return what a rank computes on; on a CPU, give torch its share of the threads."""
    compute = resolve_compute(config.device, config.precision, ranks.local_rank)
    if compute.device.type == "cpu":
        share = default_threads(ranks.local_world_size) // ranks.local_world_size
        torch.set_num_threads(config.threads or max(1, share))
    return compute


def run_notes(compute: Compute) -> dict[str, str]:
    """Return on what a run was begun: another GPU or library gives other last bits, and may go on with it."""
    versions = {"tec_cache": __version__, "torch": str(torch.__version__), "precision": compute.precision}
    return versions | device_notes(compute.device)


def with_micro_batch(config: C, task: str, most: int, compute: Compute, ranks: Ranks, *, overwrite: bool) -> C:
    """Return the settings with a micro-batch where none was asked for.

    A run goes on with the one that it began with, or the nearest below that divides another number of processes: it
    decides the last bits. A new one takes on a CPU the whole share of a process, on a GPU what fits: at most `most`.
    Every rank finds the same.
    """
    if config.micro_batch is not None:
        return config
    begun = None if overwrite else begun_run(Path(config.out), task)
    if begun is not None:
        most = begun["config"]["micro_batch"] or config.batch_size
    elif compute.device.type == "cpu":
        most = config.batch_size
    return replace(config, micro_batch=fitting(config, ranks, most))


def run_task(
    make_task: Callable[[], T],
    settings: dict[str, Any],
    config: LoopSettings,
    compute: Compute,
    ranks: Ranks,
    *,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
    extend: bool = False,
) -> Ran[T]:
    """Run a task's loop from the last checkpoint of its folder, or from the beginning.

    settings: of run.json, without total_steps and most notes. make_task: called once it is known that the folder may
    hold this run. Nothing is written or replaced before all of it is made, when nothing can be refused any more.
    dry_run: nothing is. extend: the run may have been begun with another number of epochs.
    """
    run = Path(config.out)
    with ExitStack() as lock:
        start = find_start(run, settings, overwrite=overwrite, extend=extend)
        task = make_task()
        loop: Loop[Any] = Loop(task, config, compute, ranks)
        settings = settings | {"total_steps": loop.total_steps, "notes": settings.get("notes", {}) | run_notes(compute)}
        if not dry_run:
            start = begin_run(run, settings, overwrite=overwrite, ranks=ranks, lock=lock, extend=extend)
        loop.resume(start.checkpoint, start.identity, start.extensions)
        if dry_run:
            return Ran(task, loop, loop.summary(finished=False, seconds=0.0), True, [], start.extensions)
        done = loop.run(run, start.identity, quiet=quiet)
        return Ran(task, loop, done, False, foreign_files(run, start.identity), start.extensions)
