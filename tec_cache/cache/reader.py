"""The reading half of the cache. Only what has a commit record is there; what is read is checked."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tec_cache.cache import layout, version1
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.listing import units_in
from tec_cache.cache.manifest import read_manifest, require_current
from tec_cache.cache.pixels import most_crop_bytes
from tec_cache.cache.places import CropPlaces, TargetPlaces
from tec_cache.cache.ranges import read_together, require_ranges, unreadable
from tec_cache.cache.record import MEND, AskedRecord, ContentRecord, SourceRecord, ViewsRecord
from tec_cache.cache.target_set import RESTORE, TargetSet
from tec_cache.errors import CacheError, ConfigError, TecCacheError, listed, nearest
from tec_cache.printable import counted, plural
from tec_cache.store import Store
from tec_cache.types import TargetSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tec_cache.cache.finding import Sample
    from tec_cache.cache.index.heading import ViewsHeading
    from tec_cache.cache.index.reading import UnitIndex

T = TypeVar("T")
U = TypeVar("U")

RECORD_THREADS = 16
"""Records are small; from an object store each is a round trip."""


@dataclass(frozen=True)
class Cache:
    """The views of a cache and the target sets over them.

    `cache["mae"]` is a target set; `cache.identity` says how the views were made.
    """

    store: Store
    manifest: dict[str, Any]
    only: frozenset[tuple[int, int]] | None = None
    """The groups (shard, group) to which this cache is narrowed; None for all."""

    packed: ClassVar[bool] = False
    """Whether crops and codes are in the same tars, as in a pack."""
    mend: ClassVar[str] = MEND
    """What to do about damage."""
    go_on: ClassVar[str] = "run the same tec-cache extract again, it goes on where it stopped"

    @property
    def identity(self) -> dict[str, Any]:
        """How the views were made: view plan, JPEG settings, grid, group size and source shards."""
        identity: dict[str, Any] = self.manifest["identity"]
        return identity

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return str(self.manifest["fingerprint"])

    def require_current(self) -> None:
        """Raise ConfigError if the cache has an older format version, which can be read but not added to."""
        require_current(self.manifest, self.store.url)

    @property
    def bound(self) -> bool:
        """Whether records bind each unit to its photos, as they do from format version 2 on."""
        return bool(self.manifest["format"] != version1.VERSION)

    @property
    def shards(self) -> list[str]:
        """Names of the source shards."""
        return [shard["name"] for shard in self.identity["source"]["shards"]]

    @property
    def size(self) -> int:
        """Pixels per side of a stored crop."""
        return int(self.identity["views"]["size"])

    @property
    def grid(self) -> int:
        """Patches per side for which the crops are meant."""
        return int(self.identity["grid"])

    def again(self) -> Cache:
        """Return the same cache without anything that was remembered from reading it."""
        return replace(self)

    @functools.cached_property
    def _opened_index(self) -> tuple[UnitIndex[ViewsHeading] | None, str]:
        from tec_cache.cache.index.reading import open_views_index, opened

        return opened(lambda: open_views_index(self)) if self.only is None else (None, "")

    @property
    def index(self) -> UnitIndex[ViewsHeading] | None:
        """The index of the views, if there is a valid one; None if the records have to be read instead."""
        return self._opened_index[0]

    @property
    def index_problem(self) -> str:
        """Why there is no usable index although there is an index file; empty otherwise."""
        return self._opened_index[1]

    @functools.cached_property
    def view_units(self) -> list[Unit]:
        """All committed units of views, sorted; what has no record is not there."""
        return self.committed()

    def committed(self, target: str | None = None) -> list[Unit]:
        """List the units of views, or of a target set, that have a record by now, sorted."""
        return self._wanted(
            units_in(self.store, layout.VIEW_RECORDS if target is None else layout.target_records(target))
        )

    def _wanted(self, units: list[Unit]) -> list[Unit]:
        return units if self.only is None else [unit for unit in units if (unit.shard, unit.group) in self.only]

    @functools.cached_property
    def view_unit_set(self) -> frozenset[Unit]:
        """The committed units of views as a set, for quick membership tests."""
        return frozenset(self.view_units)

    @functools.cached_property
    def num_views(self) -> int:
        """Views per photo that were asked for, or that any unit has; `require_complete` checks that all are there.

        Raises CacheError for a damaged record of what was asked for.
        """
        there = (self.index.heading.num_views,) if self.index else (unit.view + 1 for unit in self.view_units)
        return max((*(number + 1 for number in self.asked_views), *there), default=0)

    @functools.cached_property
    def asked_views(self) -> list[int]:
        """Numbers of the views that were asked for, sorted."""

        def read(name: str) -> int:
            record = AskedRecord.read(self.store, name)
            if record.identity != self.fingerprint:
                raise CacheError("what was asked of another cache", where=self.store.place(name), todo=MEND)
            return record.view

        # what is no record is never read; an audit names it
        files = {name: layout.file_of(name) for name in self.store.names(layout.ASKED_RECORDS)}
        views = {name: file.number for name, file in files.items() if file is not None and file.number is not None}
        if self.index and sorted(views.values()) == list(range(self.index.heading.num_views)):
            return list(range(len(views)))  # the index was made when each of these was read
        with ThreadPoolExecutor(RECORD_THREADS, thread_name_prefix="records") as pool:
            return sorted(pool.map(read, views))

    @functools.cached_property
    def target_names(self) -> list[str]:
        """Names of the target sets in the cache."""
        names = [name for name in self.store.entries(layout.TARGETS) if layout.is_set_name(name)]
        return [name for name in names if self.store.size(layout.target_manifest(name)) is not None]

    def __getitem__(self, name: str) -> TargetSet:
        if name not in self.target_names:
            raise ConfigError(
                f"this cache has no target set {name!r}{nearest(name, self.target_names)}",
                where=self.store.url,
                todo=f"it has: {', '.join(self.target_names) or 'none; make one with tec-cache extract --base'}",
            )
        where = self.store.place(layout.target_manifest(name))
        manifest = read_manifest(self.store, layout.target_manifest(name))
        problem = target_manifest_problem(manifest, self.manifest)
        if problem:
            raise CacheError(problem, where=where, todo=RESTORE)
        return TargetSet(self, name, manifest)

    def find(self, key: str, *, view: int = 0, shard: str | None = None) -> Sample:
        """Find a photo by the key that its source gives it, in one of its views.

        shard: name of its source shard, needed if several shards have that key. Raises ConfigError if there is no such
        photo or view, or if there are several; CacheError for damage.
        """
        from tec_cache.cache.finding import find

        return find(self, key, view=view, shard=shard)

    def views_record(self, unit: Unit) -> ViewsRecord:
        """Read the record of a unit of views and check that it belongs to this cache."""
        name = layout.views_record(unit)
        record = ViewsRecord.read(self.store, name)
        problem = self.views_problem(record, unit)
        if problem:
            raise CacheError(problem, where=self.store.place(name), todo=self.mend)
        return record

    def views_problem(self, record: ViewsRecord, unit: Unit) -> str:
        """Say why a unit's views do not belong to this cache or to the photos that were read; empty if they do."""
        source = self.source_record(unit.shard)
        if record.identity != self.fingerprint:
            return "a unit of another cache"
        if unit.shard >= len(self.shards) or (source is not None and unit.group >= source.groups):
            return "the source has no such group of photos"
        if self.bound == (record.photos_sha256 == version1.UNKNOWN):
            return "a unit of another format version"
        if len(record.keys) + len(record.skipped) > self.identity["group_size"]:
            return f"more than {counted(self.identity['group_size'], 'photo')} in a group"
        if source is not None and record.photos_sha256 != source.group_sha256[unit.group]:
            return "it shows other photos than the source shard had when it was read to its end"
        return ""

    def views_records(self, units: Iterable[Unit]) -> list[ViewsRecord]:
        """Read many records, several at a time."""
        return self.of_units(units, lambda unit: self.views_record(unit))

    def of_units(self, units: Iterable[U], what: Callable[[U], T]) -> list[T]:
        """Do something for many units, several at a time: a record of 1,000 keys takes 200 KB, so keep what counts."""
        _ = self.source_records  # once, and not by every thread
        with ThreadPoolExecutor(RECORD_THREADS, thread_name_prefix="records") as pool:
            return list(pool.map(what, units))

    def source_record(self, shard: int) -> SourceRecord | None:
        """Return the record of a source shard that was read to its end; None if there is none."""
        return self.source_records.get(shard)

    @functools.cached_property
    def source_records(self) -> dict[int, SourceRecord]:
        """The records of all source shards that were read to their end, by number."""

        def read(shard: int) -> SourceRecord:
            name = layout.source_record(shard)
            record, problem = SourceRecord.read(self.store, name), ""
            if record.shard != self.shards[shard]:
                problem = "the record of another source shard"
            elif content is not None and record.sha256 != content.source_sha256[shard]:
                problem = "the source shard had other photos when this cache was finished"
            if problem:
                raise CacheError(problem, where=self.store.place(name), todo=MEND)
            return record

        content = self.content_record

        names = set(self.store.names(layout.SOURCE_RECORDS))
        there = [shard for shard in range(len(self.shards)) if layout.source_record(shard) in names]
        with ThreadPoolExecutor(RECORD_THREADS, thread_name_prefix="records") as pool:
            return dict(zip(there, pool.map(read, there), strict=True))

    @functools.cached_property
    def content_record(self) -> ContentRecord | None:
        """The record of which photos all source shards hold; None until all of them have been read."""
        name = layout.CONTENT_RECORD
        try:
            record = ContentRecord.read(self.store, name)
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise
        if record.identity != self.fingerprint or len(record.source_sha256) != len(self.shards):
            raise CacheError("what the photos of another cache were", where=self.store.place(name), todo=MEND)
        return record

    @property
    def groups(self) -> dict[int, int]:
        """Number of groups of each source shard that was read to its end."""
        return {shard: record.groups for shard, record in self.source_records.items()}

    def missing_units(self, num_views: int, target: str | None = None) -> list[Unit]:
        """List the missing units; a shard that was not read to its end is listed by its first missing group."""
        there = set(self.view_units if target is None else self.committed(target))
        if self.only is not None:
            return [u for s, g in sorted(self.only) for v in range(num_views) if (u := Unit(s, g, v)) not in there]
        missing, groups = [], self.groups
        begun = {unit.shard: unit.group + 1 for unit in sorted(there)}
        for shard in range(len(self.shards)):
            if shard not in groups:
                missing.append(Unit(shard, begun.get(shard, 0), 0))
                continue
            wanted = (Unit(shard, g, v) for g in range(groups[shard]) for v in range(num_views))
            missing += [unit for unit in wanted if unit not in there]
        return missing

    def require_complete(self, num_views: int, target: str | None = None) -> None:
        """Raise CacheError unless every unit of the first `num_views` views (and of a target set) is there."""
        if self.index is None or self.index.heading.num_views < num_views or target is not None:
            self.require_recorded(num_views, target)

    def require_recorded(self, num_views: int, target: str | None = None) -> None:
        """Raise CacheError unless every unit has a record, whatever an index says; for programs that add to a cache."""
        missing = self.missing_units(num_views, target)
        if missing or not self.view_units:
            what = f"target set {target!r}" if target else "the views"
            whole = min((unit.view for unit in missing), default=0)
            todo = self.go_on
            if whole:
                todo += f"; or use the {plural(whole, 'view')} of which nothing is missing: --views {whole}"
            if self.view_units:
                todo += "; or train on what is finished: --partial"
            what = f"{what}: units are missing, {listed(map(str, missing))}"
            raise CacheError(what, where=self.store.url, todo=todo)
        if self.bound and self.only is None and self.content_record is None:
            what = "the record of what all photos were is missing"
            raise CacheError(what, where=self.store.place(layout.CONTENT_RECORD), todo=self.go_on)

    def finished_groups(self, num_views: int, target: str | None = None) -> frozenset[tuple[int, int]]:
        """List the groups (shard, group) whose views, and targets, are all committed by now."""
        there = set(self.view_units)
        if target is not None:
            there &= set(self[target].units)
        groups = {(unit.shard, unit.group) for unit in there}
        return frozenset((s, g) for s, g in groups if all(Unit(s, g, v) in there for v in range(num_views)))

    def narrowed(self, groups: Iterable[tuple[int, int]]) -> Cache:
        """Return the same cache, limited to some groups of samples."""
        return replace(self, only=frozenset(groups))

    def read_crops(self, record: CropPlaces, rows: Sequence[int]) -> list[bytes]:
        """Read the JPEGs of some rows of a unit, each checked against its CRC-32; successive rows in one piece."""
        if not rows or record.payload is None:
            return []
        name = record.payload.name
        ranges = [(int(record.offsets[row]), int(record.sizes[row])) for row in rows]
        require_ranges(ranges, record.payload, most_crop_bytes(self.size), self.store.place(name), self.mend)
        try:
            if list(rows) == list(range(rows[0], rows[-1] + 1)):
                crops = read_together(self.store, name, ranges)
            else:
                crops = self.store.read_ranges(name, ranges)
        except OSError as error:
            raise unreadable("crops", self.store.place(name), error, self.mend) from error
        for row, crop in zip(rows, crops, strict=True):
            if zlib.crc32(crop) != record.crc32[row]:
                if self.store.drop_copy(name):
                    return self.read_crops(record, rows)
                where = f"{self.store.place(name)}, row {row}"
                raise CacheError(f"crop{self.key_of(record, row)} is damaged", where=where, todo=self.mend)
        return crops

    def key_of(self, record: CropPlaces, row: int) -> str:
        """Return a sample's key for a message: an index knows it by its hash alone, so the unit's record is read."""
        try:
            return f" {self.views_record(Unit.parse(record.unit)).keys[row]!r}"
        except (TecCacheError, IndexError):
            return ""

    def read_block(
        self, views: CropPlaces, number: int, targets: Sequence[TargetSet], coded: Sequence[TargetPlaces]
    ) -> tuple[list[bytes], list[dict[str, npt.NDArray[np.generic]]]]:
        """Read block `number` of a unit: its crops as JPEGs, and the stored arrays (rows, ...) of each target set.

        coded: where those of each set lie.
        """
        crops = self.read_crops(views, block_rows(len(views.sizes), number))
        return crops, [target.read_block(places, number) for target, places in zip(targets, coded, strict=True)]


def block_rows(count: int, number: int) -> range:
    """Return the rows of block `number` of a unit of `count`."""
    return range(number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, count))


def target_manifest_problem(manifest: dict[str, Any], of: dict[str, Any]) -> str:
    """Say why a target set does not belong to the cache with the manifest `of`; empty if it does."""
    identity, grid = manifest["identity"], of["identity"]["grid"]
    if identity["cache"] != of["fingerprint"]:
        return "a target set of another cache"
    if manifest["format"] != of["format"]:
        return f"its format version is {manifest['format']}, that of the cache {of['format']}"
    if TargetSpec(**identity["spec"]).grid_shape != (grid, grid):
        return "a target set over another grid than the cache's"
    return ""
