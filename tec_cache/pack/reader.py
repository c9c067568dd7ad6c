"""A pack is a cache to whoever reads it: the same units, rows and fingerprints, in one tar per unit.

The samples of a block lie one behind the other, crop and codes together, so a block is one range of one file.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.listing import units_in
from tec_cache.cache.manifest import read_manifest
from tec_cache.cache.pixels import most_crop_bytes
from tec_cache.cache.places import CropPlaces, Places, TargetPlaces
from tec_cache.cache.ranges import read_together, require_ranges, unreadable
from tec_cache.cache.reader import Cache, block_rows
from tec_cache.cache.record import PackedCodes, PackRecord, Payload, TargetRecord, ViewsRecord
from tec_cache.cache.target_set import TargetSet
from tec_cache.codec import ArraySpec
from tec_cache.errors import CacheError
from tec_cache.pack.frames import MAGIC, most_member_bytes, read_members
from tec_cache.store import Store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MEND = "remove this tar and its record, then run the same tec-cache pack again; or fetch the file once more"


def open_pack(store: Store) -> Pack:
    """Open a pack, which `open_cache` has recognized. Raises CacheError where it is damaged or unfinished."""
    pack = read_manifest(store, layout.PACK)
    if store.size(layout.MANIFEST) is None:
        raise CacheError("a pack that was only just begun", where=store.url, todo=Pack.go_on)
    manifest = read_manifest(store, layout.MANIFEST)
    if pack["identity"]["cache"] != manifest["fingerprint"]:
        where = store.place(layout.MANIFEST)
        raise CacheError("the pack of another cache", where=where, todo=f"restore {layout.MANIFEST} from a copy")
    return Pack(store, manifest, pack=pack["identity"])


@dataclass(frozen=True)
class Pack(Cache):
    """The views and target sets that were packed."""

    pack: dict[str, Any] = field(default_factory=dict)
    """Identity of the pack: fingerprint of the cache, number of views, target sets."""

    packed: ClassVar[bool] = True
    mend: ClassVar[str] = MEND
    go_on: ClassVar[str] = "run the same tec-cache pack again, it goes on where it stopped"

    def committed(self, target: str | None = None) -> list[Unit]:
        """List the units of views, or of a target set, which are in a pack the same ones."""
        return self.view_units if target is not None else self._wanted(units_in(self.store, layout.PACK_RECORDS))

    @functools.cached_property
    def num_views(self) -> int:
        """Views per photo that were packed."""
        return int(self.pack["num_views"])

    @functools.cached_property
    def target_names(self) -> list[str]:
        """Names of the packed target sets."""
        return sorted(self.pack["targets"])

    def __getitem__(self, name: str) -> TargetSet:
        found = super().__getitem__(name)
        if found.fingerprint != self.pack["targets"][name]["fingerprint"]:
            where = self.store.place(layout.target_manifest(name))
            raise CacheError("the manifest of another target set", where=where, todo="restore it from a copy")
        return PackedTargetSet(self, name, found.manifest)

    def views_record(self, unit: Unit) -> PackRecord:
        """Read the record of a unit and check that it belongs to this pack."""
        name = layout.pack_record(unit)
        record = PackRecord.read(self.store, name)
        other = sorted(record.targets) != self.target_names
        problem = "a unit of another pack" if other else self.views_problem(record, unit)
        if problem:
            raise CacheError(problem, where=self.store.place(name), todo=MEND)
        return record

    def read_block(
        self, views: CropPlaces, number: int, targets: Sequence[TargetSet], coded: Sequence[TargetPlaces]
    ) -> tuple[list[bytes], list[dict[str, npt.NDArray[np.generic]]]]:
        """Read block `number` of a unit, crops and codes in one range; each is checked against its CRC-32."""
        rows = block_rows(len(views.sizes), number)
        if not rows or not targets:
            return self.read_crops(views, rows), [{} for _ in targets]
        parts: dict[str, Places] = {"": views}
        for target, places in zip(targets, coded, strict=True):
            assert isinstance(places, PackedTargetRecord | IndexedCodes)
            parts[target.name] = places.codes
        most = max(most_member_bytes(target.arrays) for target in targets)
        crops, *members = self._read(views, rows, parts, most)
        found = zip(targets, members, strict=True)
        return crops, [self.decoded(views, of_set, target.arrays) for target, of_set in found]

    def read_codes(
        self, views: CropPlaces, codes: Places, rows: range, specs: Mapping[str, ArraySpec]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Read a target set's arrays in some rows of a unit, each member checked against its CRC-32."""
        if not rows:
            return {}
        (members,) = self._read(views, rows, {"codes": codes}, most_member_bytes(specs))
        return self.decoded(views, members, specs)

    def decoded(
        self, views: CropPlaces, members: Sequence[bytes], specs: Mapping[str, ArraySpec]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Decode members to arrays (rows, ...). Raises CacheError for those that are none."""
        try:
            return read_members(members, specs, magic=MAGIC if self.bound else b"")
        except ValueError as error:
            where = f"{self.store.url}, unit {views.unit}"
            raise CacheError(f"damaged codes: {error}", where=where, todo=MEND) from error

    def _read(self, views: CropPlaces, rows: range, parts: Mapping[str, Places], most: int) -> list[list[bytes]]:
        """Read all members of `parts` in successive rows, in one range where they lie together.

        most: bytes that a member of codes can have.
        """
        assert views.payload is not None
        name = views.payload.name
        ranges = {key: [(int(part.offsets[i]), int(part.sizes[i])) for i in rows] for key, part in parts.items()}
        for key, wanted in ranges.items():
            most_bytes = most_crop_bytes(self.size) if parts[key] is views else most
            require_ranges(wanted, views.payload, most_bytes, self.store.place(name), MEND)
        order = sorted((at, key) for key, wanted in ranges.items() for at in wanted)
        try:
            pieces = read_together(self.store, name, [at for at, _ in order])
        except OSError as error:
            raise unreadable("samples", self.store.place(views.payload.name), error, MEND) from error
        read = dict(zip(order, pieces, strict=True))
        found = []
        for key, part in parts.items():
            members = [read[at, key] for at in ranges[key]]
            for row, member in zip(rows, members, strict=True):
                if zlib.crc32(member) != part.crc32[row]:
                    if self.store.drop_copy(views.payload.name):  # a damaged copy of it: the store's own is asked
                        return self._read(views, rows, parts, most)
                    what = "crop" if part is views else "codes of"
                    where = f"{self.store.place(views.payload.name)}, row {row}"
                    raise CacheError(f"{what}{self.key_of(views, row)}: damaged", where=where, todo=MEND)
            found.append(members)
        return found


@dataclass(frozen=True)
class IndexedCodes:
    """Where one target set's codes of a unit lie, from an index."""

    count: int
    payload: Payload | None
    codes: Places
    blocks: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PackedTargetRecord(TargetRecord):
    """What a pack's record says of one target set; never written by itself. `blocks` names the arrays only."""

    codes: PackedCodes
    views: PackRecord


@dataclass(frozen=True)
class PackedTargetSet(TargetSet):
    """One base's targets over the views of a pack."""

    def record(self, unit: Unit, views: ViewsRecord | None = None) -> PackedTargetRecord:
        """Return what the unit's record says of this set, and check that it belongs to it."""
        record = views if isinstance(views, PackRecord) else self._pack.views_record(unit)
        codes, codec = record.targets[self.name], self.codec_record.payload
        if codes.identity != self.fingerprint or codes.codec_sha256 != (codec.sha256 if codec else ""):
            where = self.cache.store.place(layout.pack_record(unit))
            raise CacheError(f"these are not targets of {self.name!r} as it is coded here", where=where, todo=MEND)
        payload = record.payload
        return PackedTargetRecord(
            unit=record.unit,
            identity=codes.identity,
            codec_sha256=codes.codec_sha256,
            count=len(record.keys),
            keys_sha256=record.keys_sha256,
            views_sha256=payload.sha256 if payload else "",
            payload=Payload(payload.name, sum(codes.sizes), payload.sha256) if payload else None,
            blocks={name: [] for name in self.arrays} if payload else {},
            codes=codes,
            views=record,
        )

    def read_block(self, record: TargetPlaces, number: int) -> dict[str, npt.NDArray[np.generic]]:
        """Read block `number` of a unit: array -> (rows, ...)."""
        assert isinstance(record, PackedTargetRecord)
        return self._pack.read_codes(record.views, record.codes, block_rows(record.count, number), self.arrays)

    @property
    def _pack(self) -> Pack:
        assert isinstance(self.cache, Pack)
        return self.cache
