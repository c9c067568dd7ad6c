"""From the cache to batches: an order that depends on (seed, epoch) alone, read block by block.

Threads do the reading: JPEG decoding, decompression and file access all release the interpreter's lock.
Codes stay as they are stored and pixels stay uint8 until they are on the device.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.pixels import decode_crop, resize
from tec_cache.cache.reader import Cache, TargetSet
from tec_cache.cache.record import TargetRecord, ViewsRecord
from tec_cache.errors import CacheError, ConfigError
from tec_cache.rng import bits, key64, permutation

WINDOW_BLOCKS = 32
"""Blocks whose rows are shuffled among each other: 1,024 rows."""


@dataclass(frozen=True)
class Batch:
    """Some rows of the cache, still as they are stored.

    pixels: size -> (B, size, size, 3) uint8, for each size asked for. codes: the target set's arrays, batch
    first (empty without one). sample_keys: (B,) uint64, a function of (source shard, key).
    labels: (B,) int64, -1 where a photo has none.
    """

    pixels: dict[int, torch.Tensor]
    codes: dict[str, torch.Tensor]
    sample_keys: npt.NDArray[np.uint64]
    labels: torch.Tensor

    def images(self, size: int, device: torch.device, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """Return normalized images (B, 3, size, size) float32 on the device; mean, std: (3,) there."""
        pixels = self.pixels[size].to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
        return pixels.sub_(mean[:, None, None]).div_(std[:, None, None])

    def codes_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the stored arrays on the device."""
        return {name: values.to(device, non_blocking=True) for name, values in self.codes.items()}


class _OpenUnit:
    """What is kept in memory of a unit: where its crops lie, who they are, its arrays."""

    def __init__(self, cache: Cache, targets: TargetSet | None, unit: Unit, record: ViewsRecord) -> None:
        self.cache, self.targets, self.unit, self.record = cache, targets, unit, record
        shard = cache.shards[unit.shard]
        self.sample_keys = np.array([key64("sample", shard, key) for key in self.record.keys], dtype=np.uint64)
        self.labels = np.array([-1 if x is None else x for x in self.record.labels], dtype=np.int64)

    @functools.cached_property
    def target_record(self) -> TargetRecord | None:
        """Where the targets' blocks lie, read by the first worker that needs them."""
        return None if self.targets is None else self.targets.record(self.unit, self.record)

    def block(self, number: int) -> tuple[list[bytes], dict[str, npt.NDArray[np.generic]]]:
        """Read one block: JPEGs and stored rows, each array from one range of its file."""
        return self.cache.read_block(self.record, number, self.targets, self.target_record)


class Loader:
    """Batches of a cache, with the targets of one set or of none.

    batch_size: global. The batch of step s is positions [s B, (s + 1) B) of the epoch's order, divided evenly
    among `world_size` ranks; neither ranks nor workers change the order. Epoch e reads view e mod `num_views`
    and no other file. The tail of less than one batch is left out; it differs in each epoch.
    skip_damage: let other rows of the micro-batch stand in for those of a damaged block, and name it in `damaged`,
    instead of raising CacheError.
    pixel_sizes: sizes to which the crops are resized (the stored size costs nothing).
    """

    def __init__(
        self,
        cache: Cache,
        targets: TargetSet | None,
        *,
        batch_size: int,
        pixel_sizes: tuple[int, ...],
        num_views: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        pin_memory: bool = False,
        skip_damage: bool = False,
    ) -> None:
        self.cache, self.targets = cache, targets
        self.num_views = num_views or cache.num_views
        cache.require_complete(self.num_views)
        if targets is not None:
            cache.require_complete(self.num_views, targets.name)
        if batch_size % world_size:
            raise ConfigError(
                f"a batch of {batch_size} does not divide among {world_size} ranks",
                todo="use a --batch-size that the number of processes divides",
            )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.workers, self.pin_memory = seed, max(1, workers), pin_memory
        self.pixel_sizes, self.skip_damage = pixel_sizes, skip_damage
        self.damaged: set[str] = set()
        self._epoch = -1
        self._units: list[_OpenUnit] = []
        self._blocks: OrderedDict[tuple[int, int], Future[Any]] = OrderedDict()
        self._holders: Counter[tuple[int, int]] = Counter()
        self._lock = Lock()
        self._order: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
        self._open_epoch(0)
        self.num_samples = len(self._order[0])
        if batch_size > self.num_samples:
            raise ConfigError(
                f"a batch of {batch_size} does not fit into an epoch of {self.num_samples} views",
                where=cache.store.url,
                todo=f"use --batch-size {self.num_samples} or less",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.num_samples // self.batch_size

    def batches(
        self, start_step: int, stop_step: int, *, micro_batches: int = 1
    ) -> Generator[tuple[int, list[Batch]], None, None]:
        """Yield (epoch, this rank's micro-batches) of steps start..stop, counted over all epochs."""
        share = self.batch_size // self.world_size
        if share % micro_batches:
            raise ConfigError(f"{share} views per rank do not divide into {micro_batches} micro-batches")
        size = share // micro_batches
        with ThreadPoolExecutor(self.workers, thread_name_prefix="loader") as pool:
            ahead: deque[tuple[int, list[Future[Batch]]]] = deque()
            step = start_step
            try:
                while ahead or step < stop_step:
                    while step < stop_step and sum(len(f) for _, f in ahead) < 2 * self.workers + micro_batches:
                        epoch, place = divmod(step, self.steps_per_epoch)
                        if epoch != self._epoch:
                            if ahead:
                                break  # units of the old epoch are still being read
                            self._open_epoch(epoch)
                        mine = self._positions(place)[self.rank * share : (self.rank + 1) * share]
                        parts = [mine[i : i + size] for i in range(0, share, size)]
                        for part in parts:
                            self._hold(part)
                        ahead.append((epoch, [pool.submit(self._load, part) for part in parts]))
                        step += 1
                    epoch, futures = ahead.popleft()
                    yield epoch, [future.result() for future in futures]
            finally:
                for _, futures in ahead:
                    for future in futures:
                        future.cancel()

    def _open_epoch(self, epoch: int) -> None:
        """Open the units of the epoch's view and make its order."""
        view = epoch % self.num_views
        if self._epoch < 0 or view != self._epoch % self.num_views:
            units = [unit for unit in self.cache.view_units if unit.view == view]
            records = self.cache.views_records(units)
            self._units = [_OpenUnit(self.cache, self.targets, u, r) for u, r in zip(units, records, strict=True)]
            self._blocks.clear()
            self._holders.clear()
        self._order = epoch_order([len(u.record.keys) for u in self._units], seed=self.seed, epoch=epoch)
        if self._epoch >= 0 and len(self._order[0]) != self.num_samples:
            raise CacheError(
                f"view {view} has {len(self._order[0])} crops, view 0 has {self.num_samples}",
                where=self.cache.store.url,
                todo="the source changed between two extractions: make the cache again",
            )
        self._epoch = epoch

    def _positions(self, place: int) -> npt.NDArray[np.int64]:
        """Return the positions of one global batch, sorted by unit and row.

        Which rows a batch holds is the epoch's order; within it they are sorted, so that each rank and
        micro-batch needs few blocks.
        """
        positions = np.arange(place * self.batch_size, (place + 1) * self.batch_size)
        units, rows = self._order[0][positions], self._order[1][positions]
        return positions[np.lexsort((rows, units))]

    def _needed(self, positions: npt.NDArray[np.int64]) -> set[tuple[int, int]]:
        units, rows = self._order[0][positions], self._order[1][positions]
        return set(zip(units.tolist(), (rows // BLOCK_ROWS).tolist(), strict=True))

    def _hold(self, positions: npt.NDArray[np.int64]) -> None:
        """Keep the blocks of a batch from now until it is loaded."""
        with self._lock:
            for block in self._needed(positions):
                self._holders[block] += 1

    def _release(self, positions: npt.NDArray[np.int64]) -> None:
        """Let go of a batch's blocks; of those that nobody waits for, the last window's are kept."""
        with self._lock:
            for block in self._needed(positions):
                self._holders[block] -= 1
                if not self._holders[block]:
                    del self._holders[block]
            idle = [block for block in self._blocks if block not in self._holders]
            for block in idle[: max(0, len(idle) - WINDOW_BLOCKS)]:
                del self._blocks[block]

    def _block(self, unit: int, number: int) -> tuple[list[bytes], dict[str, npt.NDArray[np.generic]]]:
        """Return a block, reading it once however many threads ask."""
        with self._lock:
            future = self._blocks.get((unit, number))
            mine = future is None
            if future is None:
                future = self._blocks[unit, number] = Future()
            else:
                self._blocks.move_to_end((unit, number))
        if mine:
            try:
                future.set_result(self._units[unit].block(number))
            except BaseException as error:
                future.set_exception(error)
        block: tuple[list[bytes], dict[str, npt.NDArray[np.generic]]] = future.result()
        return block

    def _load(self, positions: npt.NDArray[np.int64]) -> Batch:
        """Load some positions of the current epoch's order."""
        try:
            return self._read(positions)
        finally:
            self._release(positions)

    def _read(self, positions: npt.NDArray[np.int64]) -> Batch:
        units, rows, count = self._order[0][positions], self._order[1][positions], len(positions)
        pixels = {s: np.empty((count, s, s, 3), np.uint8) for s in self.pixel_sizes}
        codes: dict[str, npt.NDArray[np.generic]] = {}
        keys = np.empty(count, np.uint64)
        labels = np.empty(count, np.int64)
        whole = self._whole(units, rows)
        for i, (unit, row) in enumerate(whole):
            number, within = divmod(row, BLOCK_ROWS)
            crops, arrays = self._block(unit, number)
            crop = decode_crop(crops[within])
            for size, out in pixels.items():
                out[i] = resize(crop, size)
            for name, values in arrays.items():
                if name not in codes:
                    codes[name] = np.empty((count, *values.shape[1:]), values.dtype)
                codes[name][i] = values[within]
            keys[i] = self._units[unit].sample_keys[row]
            labels[i] = self._units[unit].labels[row]
        return Batch(
            {size: self._tensor(values) for size, values in pixels.items()},
            {name: self._tensor(values) for name, values in codes.items()},
            keys,
            torch.from_numpy(labels),
        )

    def _whole(self, units: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """Return (unit, row) of each place, those of damaged blocks replaced by others in turn, if that is asked."""
        places = list(zip(units.tolist(), rows.tolist(), strict=True))
        if not self.skip_damage:
            return places
        bad = set()
        for unit, number in {(unit, row // BLOCK_ROWS) for unit, row in places}:
            try:
                self._block(unit, number)
            except CacheError as error:
                bad.add((unit, number))
                self.damaged.add(f"unit {self._units[unit].unit}, block {number}: {error.what}")
        good = [place for place in places if (place[0], place[1] // BLOCK_ROWS) not in bad]
        if not good:
            todo = "tec-cache verify CACHE --full lists what is damaged, --repair drops it"
            raise CacheError("every block of a batch is damaged", where=self.cache.store.url, todo=todo)
        stand_in = itertools.cycle(good)
        return [next(stand_in) if (unit, row // BLOCK_ROWS) in bad else (unit, row) for unit, row in places]

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        # torch computes little with uint16, and row numbers fit into int16's positive half up to 181 x 181 patches
        tensor = torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)
        return tensor.pin_memory() if self.pin_memory else tensor


def epoch_order(
    counts: list[int], *, seed: int, epoch: int, window_blocks: int = WINDOW_BLOCKS
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the order of an epoch as (unit number, row) of each position, two (N,) arrays.

    counts: rows of each unit. Blocks of all units are permuted; then the rows of every `window_blocks`
    successive blocks are shuffled among each other. A pure function of its arguments.
    """
    per_unit = [-(-count // BLOCK_ROWS) for count in counts]
    units = np.repeat(np.arange(len(counts)), per_unit)
    blocks = np.concatenate([np.arange(n) for n in per_unit]) if per_unit else np.empty(0, np.int64)
    order = permutation(key64("blocks", seed, epoch), len(units))
    units, blocks = units[order], blocks[order]
    sizes = np.minimum(BLOCK_ROWS, np.asarray(counts, np.int64)[units] - blocks * BLOCK_ROWS)
    window = np.repeat(np.arange(len(units)) // window_blocks, sizes)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    row_units = np.repeat(units, sizes)
    rows = np.arange(len(starts)) - starts + np.repeat(blocks * BLOCK_ROWS, sizes)
    shuffle = np.lexsort((bits(key64("rows", seed, epoch), len(rows)), window))
    return row_units[shuffle], rows[shuffle]
