"""The units of an epoch: how many rows each has, and, of the few that are being read, where their rows lie.

With an index no record is opened: a unit is opened when its first block is wanted, by one small range of the index. A
cache without one is read by its records. Either way only what was used last stays open, whatever the cache's size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tec_cache.cache.index.details import (
    CROP,
    PLACE,
    block_details,
    crop_details,
    member_details,
    stored_crops,
    stored_members,
    stored_targets,
)
from tec_cache.cache.index.heading import TargetsHeading, ViewsHeading
from tec_cache.cache.index.reading import StaleIndex, UnitIndex
from tec_cache.cache.layout import Unit
from tec_cache.cache.places import CropPlaces, TargetPlaces
from tec_cache.cache.reader import Cache, block_rows
from tec_cache.cache.target_set import TargetSet
from tec_cache.errors import CacheError
from tec_cache.pack.reader import IndexedCodes, PackedTargetRecord
from tec_cache.printable import counted

OPEN_BYTES = 64 << 20
"""Of what is held of opened units: 52 bytes a view at most, so that an epoch of ImageNet stays open as a whole."""


class Block(NamedTuple):
    """A block of rows as it is read."""

    crops: list[bytes]
    """JPEGs."""
    arrays: dict[str, dict[str, npt.NDArray[np.generic]]]
    """Stored arrays (rows, ...) of each target set."""
    sample_keys: npt.NDArray[np.uint64]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class OpenUnit:
    """A unit of which is known where its rows lie: it reads blocks."""

    cache: Cache
    targets: Sequence[TargetSet]
    details: npt.NDArray[np.void]
    """(rows,) of `CROP`."""
    crops: CropPlaces
    coded: Sequence[TargetPlaces]
    """Of each target set."""
    num_bytes: int
    """In memory."""

    def __len__(self) -> int:
        return len(self.details)

    def block(self, number: int) -> Block:
        """Read one block: JPEGs and stored rows, each array from one range of its file."""
        rows = block_rows(len(self), number)
        crops, arrays = self.cache.read_block(self.crops, number, self.targets, self.coded)
        details = self.details[rows.start : rows.stop]
        found = {target.name: values for target, values in zip(self.targets, arrays, strict=True)}
        return Block(crops, found, details["sample_key"], details["label"])


class Units(Protocol):
    """The units of a cache by numbers."""

    def of_view(self, view: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the numbers of a view's units, sorted by unit, and how many rows each has."""

    def name(self, number: int) -> Unit:
        """Return a unit's name."""

    def get(self, number: int) -> OpenUnit:
        """Open a unit, unless it is open."""


def units_of(cache: Cache, targets: Sequence[TargetSet], num_views: int) -> Units:
    """Return the units of a cache: by its index where that and the sets' cover the first `num_views` views."""
    views, coded = cache.index, [target.index for target in targets]
    if views is None or views.heading.num_views < num_views:
        return RecordedUnits(cache, targets)
    whole = [index for index in coded if index is not None and index.heading.num_views >= num_views]
    return IndexedUnits(cache, targets, views, whole) if len(whole) == len(coded) else RecordedUnits(cache, targets)


class _Opened:
    """Units that were opened, each once, however many threads ask; those that were used last stay."""

    def __init__(self) -> None:
        self._units: OrderedDict[int, Future[OpenUnit]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, number: int) -> OpenUnit:
        """Return a unit, opening it if nobody has; who asks meanwhile waits for it. Raises CacheError."""
        with self._lock:
            future = self._units.get(number)
            mine = future is None
            if future is None:
                future = self._units[number] = Future()
            else:
                self._units.move_to_end(number)
        if mine:
            try:
                unit = self.open(number)
            except BaseException as error:
                with self._lock:  # a network may be back the next time
                    del self._units[number]
                future.set_exception(error)
            else:
                future.set_result(unit)
                self._make_room(unit)
        return future.result()

    def open(self, number: int) -> OpenUnit:
        """Open a unit."""
        raise NotImplementedError

    def _make_room(self, unit: OpenUnit) -> None:
        with self._lock:
            self._bytes += unit.num_bytes
            for number in list(self._units):
                if self._bytes <= OPEN_BYTES:
                    break
                if self._units[number].done():
                    self._bytes -= self._units.pop(number).result().num_bytes


class RecordedUnits(_Opened):
    """Units by their records, those of each view read when its first epoch begins."""

    def __init__(self, cache: Cache, targets: Sequence[TargetSet]) -> None:
        super().__init__()
        self.cache, self.targets = cache, targets
        self._names: Sequence[Unit] = cache.view_units
        self._rows: dict[int, npt.NDArray[np.int64]] = {}

    def of_view(self, view: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the numbers of a view's units, sorted by unit, and how many rows each has."""
        numbers = np.array([n for n, unit in enumerate(self._names) if unit.view == view], np.int64)
        if view not in self._rows:
            rows = self.cache.of_units(numbers.tolist(), lambda number: len(self.get(number)))
            self._rows[view] = np.array(rows, np.int64)
        return numbers, self._rows[view]

    def name(self, number: int) -> Unit:
        """Return a unit's name."""
        return self._names[number]

    def open(self, number: int) -> OpenUnit:
        """Read the records of a unit."""
        return recorded(self.cache, self.targets, self._names[number])


class IndexedUnits(_Opened):
    """Units by an index. One whose details cannot be used is read by its records: those are the truth."""

    def __init__(
        self,
        cache: Cache,
        targets: Sequence[TargetSet],
        views: UnitIndex[ViewsHeading],
        coded: Sequence[UnitIndex[TargetsHeading]],
    ) -> None:
        super().__init__()
        self.cache, self.targets, self.views, self.coded = cache, targets, views, coded

    def of_view(self, view: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the numbers of a view's units, sorted by unit, and how many rows each has."""
        numbers = self.views.of_view(view)
        return numbers, self.views.entries["rows"][numbers].astype(np.int64)

    def name(self, number: int) -> Unit:
        """Return a unit's name."""
        return self.views.unit(number)

    def open(self, number: int) -> OpenUnit:
        """Read the details of a unit. Raises CacheError where its records say otherwise than the index."""
        unit = self.views.unit(number)
        try:
            return self._indexed(unit, number)
        except (OSError, StaleIndex):
            opened = recorded(self.cache, self.targets, unit)
        if len(opened) != self.views.entries["rows"][number]:
            what = (
                f"unit {unit} has {counted(len(opened), 'crop')}, the index says {self.views.entries['rows'][number]}"
            )
            todo = "tec-cache index CACHE makes the index again; then run the same command again"
            raise CacheError(what, where=self.cache.store.url, todo=todo)
        return opened

    def _indexed(self, unit: Unit, number: int) -> OpenUnit:
        details = self.views.details(number, CROP)
        crops = stored_crops(unit, self.views.payload(number), details)
        coded: list[TargetPlaces] = []
        size = details.nbytes
        for index in self.coded:
            number = index.find(unit)
            places, payload = index.details(number, PLACE), index.payload(number)
            size += places.nbytes
            if self.cache.packed:
                coded.append(IndexedCodes(len(details), payload, stored_members(places)))
            else:
                arrays = index.heading.arrays
                coded.append(stored_targets(len(details), payload, places.reshape(-1, len(arrays)), arrays))
        return OpenUnit(self.cache, self.targets, details, crops, coded, size)


def recorded(cache: Cache, targets: Sequence[TargetSet], unit: Unit) -> OpenUnit:
    """Open a unit by its records; of them as much is kept as an index would hold. Raises CacheError."""
    record = cache.views_record(unit)
    details = crop_details(record, cache.shards[unit.shard])
    crops = stored_crops(unit, record.payload, details)
    coded: list[TargetPlaces] = []
    size = details.nbytes
    for target in targets:
        found = target.record(unit, record)
        if isinstance(found, PackedTargetRecord):
            places = member_details(found.codes)
            coded.append(IndexedCodes(found.count, found.payload, stored_members(places)))
        else:
            arrays = list(found.blocks)
            places = block_details(found, arrays)
            coded.append(stored_targets(found.count, found.payload, places, arrays))
        size += places.nbytes
    return OpenUnit(cache, targets, details, crops, coded, size)
