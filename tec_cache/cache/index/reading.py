"""An index as readers use it: opened, compared with the cache that it lies in, and asked for one unit at a time."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from tec_cache.cache import layout
from tec_cache.cache.index.details import CROP, PLACE
from tec_cache.cache.index.heading import Heading, TargetsHeading, ViewsHeading
from tec_cache.cache.index.table import ENTRY, PROLOGUE, read_table
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.listing import units_in
from tec_cache.cache.record import Payload
from tec_cache.errors import listed
from tec_cache.printable import counted
from tec_cache.store import Store

if TYPE_CHECKING:
    import numpy.typing as npt

    from tec_cache.cache.reader import Cache
    from tec_cache.cache.target_set import TargetSet

H = TypeVar("H", bound=Heading, covariant=True)


class StaleIndex(ValueError):
    """An index that does not fit what lies beside it: the records are read instead."""


@dataclass(frozen=True, eq=False)
class UnitIndex(Generic[H]):
    """An index of units, all but the details in memory."""

    store: Store
    name: str
    heading: H
    entries: npt.NDArray[np.void]
    """(N,) of `table.ENTRY`, sorted by unit."""
    starts: npt.NDArray[np.int64]
    """(N + 1,) positions of the details in the file."""
    groups: npt.NDArray[np.int64]
    """Number of groups of each source shard."""
    record_of: Callable[[Unit], str]
    payload_of: Callable[[Unit, str], str]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of all payloads."""
        return int(self.entries["payload_bytes"].sum())

    @property
    def num_rows(self) -> int:
        """Crops, or rows of targets."""
        return int(self.entries["rows"].sum(dtype=np.int64))

    def of_view(self, view: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the units of a view, in their order."""
        return np.flatnonzero(self.entries["view"] == view)

    def unit(self, number: int) -> Unit:
        """Return a unit by its number."""
        entry = self.entries[number]
        return Unit(int(entry["shard"]), int(entry["group"]), int(entry["view"]))

    def find(self, unit: Unit) -> int:
        """Return the number of a unit, which the index must have."""
        views = self.heading.num_views
        assert unit.group < self.groups[unit.shard]
        assert unit.view < views
        return (int(self.groups[: unit.shard].sum()) + unit.group) * views + unit.view

    def payload(self, number: int) -> Payload | None:
        """Return the payload of a unit; None for one without rows."""
        entry = self.entries[number]
        if not entry["rows"]:
            return None
        sha256 = entry["payload_sha256"].tobytes().hex()
        return Payload(self.payload_of(self.unit(number), sha256), int(entry["payload_bytes"]), sha256)

    def details(self, number: int, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        """Read the details of a unit and see that its record is there, as long as it was when the index was made.

        Returns (n,) of dtype. Raises OSError, or StaleIndex.
        """
        entry, record = self.entries[number], self.record_of(self.unit(number))
        if self.store.size(record) != entry["record_bytes"]:
            raise StaleIndex(f"{record} is gone, or another one")
        start, stop = int(self.starts[number]), int(self.starts[number + 1])
        data = self.store.read_ranges(self.name, [(start, stop - start)])[0] if stop > start else b""
        if len(data) != stop - start or zlib.crc32(data) != entry["details_crc32"]:
            raise StaleIndex(f"the details of unit {self.unit(number)} are damaged")
        return np.frombuffer(data, dtype)


def opened(index: Callable[[], UnitIndex[H]]) -> tuple[UnitIndex[H] | None, str]:
    """Return an index, or None and why it cannot be used: no reason where there is simply none."""
    try:
        return index(), ""
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except (OSError, ValueError) as error:
        return None, str(error)


def open_views_index(cache: Cache) -> UnitIndex[ViewsHeading]:
    """Open the index of a cache's (or pack's) views.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or does not fit the cache.
    """
    name, store = layout.views_index(), cache.store
    table = read_table(store, name)
    heading, entries = ViewsHeading.read(table.heading), table.entries
    content = cache.content_record
    if heading.identity != cache.fingerprint or heading.packed != cache.packed:
        raise StaleIndex("of another cache")
    if content is None or content.sha256 != heading.content_sha256 or len(heading.groups) != len(cache.shards):
        raise StaleIndex("of other photos")
    _require_full(entries, heading.groups, heading.num_views)
    _require_rows(entries, cache.identity["group_size"])
    _require_recorded(store, name, layout.PACK_RECORDS if cache.packed else layout.VIEW_RECORDS, entries)
    if store.changed_after(name, layout.SOURCE_RECORDS) and len(cache.source_records) < len(cache.shards):
        raise StaleIndex("a source shard's record is gone")
    starts = _starts(entries, entries["rows"].astype(np.int64) * CROP.itemsize)
    record_of, payload_of = (
        (layout.pack_record, layout.pack_payload) if cache.packed else (layout.views_record, layout.views_payload)
    )
    groups = np.asarray(heading.groups, np.int64)
    return UnitIndex(store, name, heading, entries, starts, groups, record_of, payload_of)


def open_targets_index(target: TargetSet) -> UnitIndex[TargetsHeading]:
    """Open the index of a target set. Raises as `open_views_index` does."""
    cache, store, name = target.cache, target.cache.store, layout.target_index(target.name)
    table = read_table(store, name)
    heading, entries = TargetsHeading.read(table.heading), table.entries
    views, codec = cache.index, target.codec_record.payload
    if heading.identity != target.fingerprint or heading.packed != cache.packed:
        raise StaleIndex("of another target set")
    if heading.codec_sha256 != (codec.sha256 if codec else "") or set(heading.arrays) != set(target.arrays):
        raise StaleIndex("of targets that were coded otherwise")
    if views is None or heading.num_views > views.heading.num_views or heading.block_rows != BLOCK_ROWS:
        raise StaleIndex("there is no index of as many views")
    _require_full(entries, views.heading.groups, heading.num_views)
    of = views.entries[views.entries["view"] < heading.num_views]
    if (entries["rows"] != of["rows"]).any() or (entries["views_sha256"] != of["payload_sha256"]).any():
        raise StaleIndex("of targets that were made from other crops")
    if not cache.packed:
        _require_recorded(store, name, layout.target_records(target.name), entries)
    counts = entries["rows"].astype(np.int64)
    if not cache.packed:
        counts = -(-counts // BLOCK_ROWS) * len(heading.arrays)
    starts = _starts(entries, counts * PLACE.itemsize)
    record_of = layout.pack_record if cache.packed else lambda unit: layout.target_record(target.name, unit)
    payload_of = (
        layout.pack_payload if cache.packed else lambda unit, sha256: layout.target_payload(target.name, unit, sha256)
    )
    return UnitIndex(store, name, heading, entries, starts, views.groups, record_of, payload_of)


def _require_full(entries: npt.NDArray[np.void], groups: list[int], num_views: int) -> None:
    """Raise StaleIndex unless the units are those of every group in the first views, and no others."""
    if sum(groups) * num_views != len(entries):
        raise StaleIndex(
            f"{counted(len(entries), 'unit')} of {counted(sum(groups), 'group')} in {counted(num_views, 'view')}"
        )
    wanted = np.zeros(len(entries), ENTRY)
    per_shard = np.asarray(groups, np.int64) * num_views
    wanted["shard"] = np.repeat(np.arange(len(groups)), per_shard)
    place = np.arange(len(entries)) - np.repeat(np.cumsum(per_shard) - per_shard, per_shard)
    wanted["group"], wanted["view"] = np.divmod(place, max(1, num_views))
    for name in ("shard", "group", "view"):
        if (entries[name] != wanted[name]).any():
            raise StaleIndex("it lacks units, or has them out of order")


def _require_rows(entries: npt.NDArray[np.void], group_size: int) -> None:
    if (entries["rows"].astype(np.int64) + entries["skipped"] > group_size).any():
        raise StaleIndex(f"more than {counted(group_size, 'photo')} in a group")


def _require_recorded(store: Store, name: str, folder: str, entries: npt.NDArray[np.void]) -> None:
    """Raise StaleIndex unless each unit has its record, where the folder of records changed after the index.

    An object store cannot say whether it did: there each record is looked for when its unit is opened.
    """
    if store.changed_after(name, folder):
        recorded = set(units_in(store, folder))
        units = zip(*(entries[part].tolist() for part in ("shard", "group", "view")), strict=True)
        gone = [unit for unit in map(Unit._make, units) if unit not in recorded]
        if gone:
            raise StaleIndex(f"records are gone: {listed(map(str, gone))}")


def _starts(entries: npt.NDArray[np.void], num_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(num_bytes)]) + PROLOGUE
