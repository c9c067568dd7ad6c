"""Batches of a cache: which rows, read by threads ahead of use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tec_cache.background import in_order
from tec_cache.cache.layout import BLOCK_ROWS
from tec_cache.cache.pixels import decode_crop, resize
from tec_cache.cache.reader import Cache
from tec_cache.cache.target_set import TargetSet
from tec_cache.errors import CacheError, ConfigError
from tec_cache.loader.batch import Batch
from tec_cache.loader.blocks import BlockCache, Name
from tec_cache.loader.order import EpochOrder
from tec_cache.loader.units import units_of
from tec_cache.pinned import PinnedSlabs
from tec_cache.printable import counted

T = TypeVar("T")

SHUFFLE_BUFFER = 1024
"""Rows that are shuffled among each other, unless asked otherwise: 32 blocks."""


@dataclass(frozen=True)
class _Rows:
    """Rows to be loaded as one batch; those of a block lie together."""

    epoch: int
    units: npt.NDArray[np.int64]
    """Number of each row's unit."""
    rows: npt.NDArray[np.int64]

    def blocks(self) -> list[tuple[Name, slice]]:
        """List the blocks that hold them, each with its places in the batch."""
        numbers = self.rows // BLOCK_ROWS
        new = (np.diff(self.units) != 0) | (np.diff(numbers) != 0)
        edges = [0, *(np.flatnonzero(new) + 1).tolist(), len(self.rows)]
        return [((int(self.units[a]), int(numbers[a])), slice(a, b)) for a, b in itertools.pairwise(edges)]

    def names(self) -> list[Name]:
        """List the names of these blocks."""
        return [name for name, _ in self.blocks()]


@dataclass(frozen=True)
class _Epoch:
    """One epoch: the units of its view, and the order of their rows."""

    number: int
    units: npt.NDArray[np.int64]
    """Numbers of the units that the order counts from zero."""
    order: EpochOrder


def _as_read(batch: Batch) -> Any:
    return batch


class Loader(Generic[T]):
    """Batches of a cache, with the targets of one set, of several, or of none.

    batch_size: views per step, over all ranks. Step s takes the positions [s B, (s + 1) B) of the epoch's order,
    divided evenly among `world_size` ranks; neither ranks nor workers change the order. Epoch e reads view
    e mod `num_views` and no other file. An incomplete last batch is left out; it differs in each epoch.
    pixel_sizes: sizes to which the crops are resized (the stored size costs nothing).
    shuffle_buffer: number of rows that are shuffled together, in whole blocks. workers: number of reading threads.
    finish: applied to each batch in these threads before it is handed over; by default nothing is done. skip_damage:
    replace the rows of a damaged block by other rows of the batch, and name the block in `damaged`, instead of raising
    CacheError.

    Memory: the rows of the buffer and of `workers` + 1 batches, `units.OPEN_BYTES` of opened units, and 0.4 bytes for
    each view of an epoch.
    """

    def __init__(
        self,
        cache: Cache,
        targets: TargetSet | Sequence[TargetSet],
        *,
        batch_size: int,
        pixel_sizes: tuple[int, ...],
        num_views: int | None = None,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        pin_memory: bool = False,
        skip_damage: bool = False,
        finish: Callable[[Batch], T] = _as_read,
    ) -> None:
        self.cache, self.targets = cache, (targets,) if isinstance(targets, TargetSet) else tuple(targets)
        self.num_views = num_views or cache.num_views
        cache.require_complete(self.num_views)
        for target in self.targets:
            target.require_complete(self.num_views)
        if batch_size % world_size:
            raise ConfigError(
                f"a batch of {counted(batch_size, 'view')} does not divide among {world_size} ranks",
                todo="use a --batch-size that the number of processes divides",
            )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.workers, self.pin_memory = seed, max(1, workers), pin_memory
        self.pixel_sizes, self.skip_damage, self._finish = pixel_sizes, skip_damage, finish
        self.damaged: set[str] = set()
        self._buffer_blocks = max(1, -(-shuffle_buffer // BLOCK_ROWS))
        self._pinned = PinnedSlabs()
        self._blocks = BlockCache(self._buffer_blocks)
        self._units = units_of(cache, self.targets, self.num_views)
        self._epoch = self._open(0)
        self.num_samples = len(self._epoch.order)
        if batch_size > self.num_samples:
            raise ConfigError(
                f"a batch of {batch_size} does not fit into an epoch of {counted(self.num_samples, 'view')}",
                where=cache.store.url,
                todo=f"use --batch-size {self.num_samples} or less, for each of --masks-per-view",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in an epoch."""
        return self.num_samples // self.batch_size

    @property
    def left_out(self) -> int:
        """Number of views in an epoch that do not fill a batch; they differ in each epoch."""
        return self.num_samples % self.batch_size

    def batches(self, start_step: int, stop_step: int, *, micro_batches: int = 1) -> Generator[T, None, None]:
        """Yield this rank's batches of steps start..stop, counted over all epochs, `micro_batches` for each step.

        Steps before the first are not read.
        """
        share = self.batch_size // self.world_size
        if share % micro_batches:
            raise ConfigError(
                f"a rank's {counted(share, 'view')} cannot be divided into {counted(micro_batches, 'micro-batch')}"
            )
        rows = self._wanted(start_step, stop_step, share // micro_batches)
        # closed here: its thread must not be waited for by whichever thread next collects garbage
        with ThreadPoolExecutor(self.workers, thread_name_prefix="loader") as pool, closing(rows) as wanted:
            yield from in_order(pool, self._load, self._held(wanted), self.workers + 1)

    def _held(self, wanted: Iterable[_Rows]) -> Iterator[_Rows]:
        """Keep the blocks of each batch from the moment at which it is begun."""
        for rows in wanted:
            self._blocks.hold(rows.names())
            yield rows

    def _wanted(self, start_step: int, stop_step: int, size: int) -> Generator[_Rows, None, None]:
        """Yield the rows of each micro-batch; the next epoch is opened while this one is read."""
        share = self.batch_size // self.world_size
        with ThreadPoolExecutor(1, thread_name_prefix="epoch") as opener:
            following: Future[_Epoch] | None = None
            for step in range(start_step, stop_step):
                number, place = divmod(step, self.steps_per_epoch)
                if number != self._epoch.number:
                    opened = following or opener.submit(self._open, number)
                    self._epoch, following = opened.result(), None
                if following is None and (number + 1) * self.steps_per_epoch < stop_step:
                    following = opener.submit(self._open, number + 1)
                units, rows = self._step_rows(self._epoch.order, place)
                for start in range(self.rank * share, (self.rank + 1) * share, size):
                    part = slice(start, start + size)
                    yield _Rows(self._epoch.number, self._epoch.units[units[part]], rows[part])

    def _open(self, number: int) -> _Epoch:
        """Make the order of an epoch's view."""
        view = number % self.num_views
        units, counts = self._units.of_view(view)
        if number and int(counts.sum()) != self.num_samples:
            raise CacheError(
                f"view {view} has {counted(int(counts.sum()), 'crop')}, view 0 has {self.num_samples}",
                where=self.cache.store.url,
                todo="the source changed between two extractions: make the cache again",
            )
        order = EpochOrder(counts, seed=self.seed, epoch=number, buffer_blocks=self._buffer_blocks)
        return _Epoch(number, units, order)

    def _step_rows(self, order: EpochOrder, place: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return units and rows of one step's batch, sorted.

        Which rows a batch holds is the epoch's order; within it they are sorted, so that each rank and
        micro-batch needs few blocks.
        """
        units, rows = order.places(place * self.batch_size, (place + 1) * self.batch_size)
        sort = np.lexsort((rows, units))
        return units[sort], rows[sort]

    def _load(self, wanted: _Rows) -> T:
        """Load some rows, and let go of their blocks."""
        try:
            return self._finish(self._read(self._undamaged(wanted) if self.skip_damage else wanted))
        finally:
            self._blocks.release(wanted.names())

    def _read(self, wanted: _Rows) -> Batch:
        count = len(wanted.rows)
        pixels = {size: self._empty((count, size, size, 3), torch.uint8) for size in self.pixel_sizes}
        codes: dict[str, dict[str, torch.Tensor]] = {target.name: {} for target in self.targets}
        keys, labels = np.empty(count, np.uint64), self._empty((count,), torch.int64)
        for block_name, places in wanted.blocks():
            block = self._blocks.get(self._units, block_name)
            within = wanted.rows[places] - block_name[1] * BLOCK_ROWS
            for place, row in zip(range(places.start, places.stop), within.tolist(), strict=True):
                self._decode(block.crops[row], pixels, place)
            for target, arrays in block.arrays.items():
                of_set = codes[target]
                for name, values in arrays.items():
                    if name not in of_set:
                        of_set[name] = self._empty((count, *values.shape[1:]), _torch_type(values.dtype))
                    of_set[name].numpy()[places] = values[within]
            keys[places], labels.numpy()[places] = block.sample_keys[within], block.labels[within]
        return Batch(wanted.epoch, pixels, codes, labels, keys)

    def _decode(self, jpeg: bytes, pixels: dict[int, torch.Tensor], place: int) -> None:
        """Decode a crop into its place, in each size."""
        stored = pixels.get(self.cache.size)
        crop = decode_crop(jpeg, None if stored is None else stored[place].numpy())
        for size, out in pixels.items():
            if size != self.cache.size:
                out[place].numpy()[...] = resize(crop, size)

    def _undamaged(self, wanted: _Rows) -> _Rows:
        """Put the other rows, in turn, in the places of those of damaged blocks."""
        good = np.ones(len(wanted.rows), bool)
        for name, places in wanted.blocks():
            try:
                self._blocks.get(self._units, name)
            except CacheError as error:
                good[places] = False
                self.damaged.add(f"unit {self._units.name(name[0])}, block {name[1]}: {error.what}")
        if not good.any():
            todo = "tec-cache verify CACHE --full lists what is damaged, --repair drops it"
            raise CacheError("every block of a batch is damaged", where=self.cache.store.url, todo=todo)
        chosen = np.arange(len(good))
        chosen[~good] = np.resize(np.flatnonzero(good), int((~good).sum()))
        return _Rows(wanted.epoch, wanted.units[chosen], wanted.rows[chosen])

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._pinned.empty(shape, dtype) if self.pin_memory else torch.empty(shape, dtype=dtype)


def _torch_type(dtype: np.dtype[np.generic]) -> torch.dtype:
    """Name torch's type for a stored array; it computes little with uint16, and has no big-endian numbers."""
    if dtype == np.uint16:
        return torch.int32
    return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
