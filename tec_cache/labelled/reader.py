"""Batches of labelled photos, made by processes ahead of use: for training, and each photo once for judging."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from tec_cache.errors import ConfigError
from tec_cache.labelled.batch import LabelledBatch
from tec_cache.labelled.index import PhotoIndex
from tec_cache.labelled.making import LEAVE_OUT, STAND_IN, STOP, Maker, Wanted
from tec_cache.labelled.order import photo_order, share_of
from tec_cache.labelled.workers import Workers
from tec_cache.printable import counted


class _Reader:
    """What readers have in common. damaged: broken photos that this rank came upon, each with its shard."""

    def __init__(self, index: PhotoIndex, maker: Maker, workers: int, pin_memory: bool) -> None:
        self.index, self.workers, self.pin_memory = index, workers, pin_memory
        self.damaged: set[str] = set()
        self._maker = maker
        self._running: set[Workers] = set()

    def close(self) -> None:
        """End all processes; batches that are asked for afterwards are a ValueError."""
        for workers in list(self._running):
            workers.end()

    def _made(self, wanted: Iterator[Wanted]) -> Generator[LabelledBatch, None, None]:
        workers = Workers(self._maker, wanted, self.workers, pin_memory=self.pin_memory)
        self._running.add(workers)
        try:
            for made in workers:
                if made.error is not None:
                    raise made.error
                self.damaged.update(made.damaged)
                if made.batch is not None:
                    yield made.batch
        finally:
            self._running.discard(workers)
            workers.end()


class PhotoReader(_Reader):
    """Batches for training, over all epochs.

    batch_size: photos of a step, over all ranks. Step s takes the positions [s B, (s + 1) B) of its epoch's order,
    divided evenly among `world_size` ranks. The tail of less than one batch is left out, others in each epoch: Mixup
    needs even batches. transform: what `index.example` takes; pixels are a function of (seed, epoch, photo), whatever
    the ranks, the micro-batches, the workers and the step at which a run goes on. workers: processes; 0: batches are
    made in this one, when they are asked for. on_error: a broken photo is a SourceError ("stop"), or the next whole one
    of its step stands in for it and it is named in `damaged` ("skip").

    Memory: two batches for each worker, in memory that processes share.
    """

    def __init__(
        self,
        index: PhotoIndex,
        transform: Any,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        pin_memory: bool = False,
        on_error: str = "stop",
    ) -> None:
        super().__init__(index, Maker(index, transform, seed, _broken(on_error, STAND_IN)), workers, pin_memory)
        if batch_size % world_size:
            raise ConfigError(
                f"a batch of {counted(batch_size, 'photo')} does not divide among {world_size} ranks",
                todo="use a --batch-size that the number of processes divides",
            )
        if not 0 < batch_size <= len(index):
            raise ConfigError(
                f"a batch of {batch_size} does not fit into an epoch of {counted(len(index), 'photo')}",
                where=index.homes[0].place,
                todo=f"use a --batch-size from 1 to {len(index)}",
            )
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return len(self.index) // self.batch_size

    @property
    def left_out(self) -> int:
        """Photos of an epoch that fill no batch; others in each epoch."""
        return len(self.index) % self.batch_size

    def batches(
        self, start_step: int, stop_step: int, *, micro_batches: int = 1
    ) -> Generator[LabelledBatch, None, None]:
        """Yield this rank's batches of steps start..stop, counted over all epochs, `micro_batches` for each step.

        Photos before the first step are not read. The processes begin with the first batch that is asked for, go on
        over all epochs, and end with the generator.
        """
        share = self.batch_size // self.world_size
        if micro_batches < 1 or share % micro_batches:
            raise ConfigError(
                f"a rank's {counted(share, 'photo')} cannot be divided into {counted(micro_batches, 'micro-batch')}"
            )
        return self._made(self._wanted(start_step, stop_step, share, share // micro_batches))

    def _wanted(self, start_step: int, stop_step: int, share: int, size: int) -> Iterator[Wanted]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(start_step, stop_step):
            number, place = divmod(step, self.steps_per_epoch)
            if number != epoch:
                epoch, order = number, photo_order(self.seed, number, len(self.index))
            numbers = order[place * self.batch_size : (place + 1) * self.batch_size]
            for start in range(self.rank * share, (self.rank + 1) * share, size):
                yield Wanted(epoch, numbers, start, start + size)


class EvaluationReader(_Reader):
    """Every photo once, in the index's order, for judging: sums over ranks count each of them once.

    batch_size: photos of a batch of this rank; its last one is short, and a rank has none where there are fewer photos
    than ranks. on_error: a broken photo is a SourceError ("stop"), or left out and named in `damaged` ("skip"): nothing
    stands in for it.
    """

    def __init__(
        self,
        index: PhotoIndex,
        transform: Any,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        pin_memory: bool = False,
        on_error: str = "stop",
    ) -> None:
        super().__init__(index, Maker(index, transform, 0, _broken(on_error, LEAVE_OUT)), workers, pin_memory)
        if batch_size < 1:
            raise ConfigError(f"a batch of {batch_size} photos", todo="use a --batch-size of 1 or more")
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def once(self) -> Generator[LabelledBatch, None, None]:
        """Yield this rank's part of all photos."""
        return self._made(self._wanted())

    def _wanted(self) -> Iterator[Wanted]:
        share = share_of(len(self.index), self.rank, self.world_size)
        for start in range(share.start, share.stop, self.batch_size):
            numbers = np.arange(start, min(start + self.batch_size, share.stop))
            yield Wanted(0, numbers, 0, len(numbers))


def _broken(on_error: str, skip: str) -> str:
    """Name what a broken photo does."""
    if on_error not in ("stop", "skip"):
        raise ConfigError(f"on_error is {on_error!r}", todo="use stop or skip")
    return skip if on_error == "skip" else STOP
