"""The writing half of the cache: payload first, durable, under a name of its own; then the record, created once.

Whoever creates the record of a unit has made it. Another job that made the same unit meanwhile finds the record,
removes its own payload unless the record names that very file, and goes on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tec_cache.cache.blocks import write_zip
from tec_cache.cache.crop_tar import write_tar
from tec_cache.cache.layout import (
    ASKED_RECORDS,
    CONTENT_RECORD,
    CROP,
    LABEL,
    Unit,
    asked_record,
    crop_name,
    target_payload,
    target_record,
    views_payload,
    views_record,
)
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import (
    AskedRecord,
    ContentRecord,
    PackRecord,
    Payload,
    TargetRecord,
    ViewsRecord,
    hash_keys,
)
from tec_cache.cache.sealed import FORMAT
from tec_cache.codec import ArraySpec
from tec_cache.printable import counted
from tec_cache.store import Store
from tec_cache.store.files import hash_file

if TYPE_CHECKING:
    import numpy.typing as npt

R = TypeVar("R", ViewsRecord, TargetRecord, PackRecord)


@dataclass(frozen=True)
class Crop:
    """One crop to be stored."""

    key: str
    jpeg: bytes
    label: int | None


@dataclass
class TargetArrays:
    """The arrays of one unit, filled batch by batch."""

    count: int
    specs: dict[str, ArraySpec]
    arrays: dict[str, npt.NDArray[np.generic]] = field(init=False)
    filled: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.arrays = {name: np.empty((self.count, *s.shape), s.dtype) for name, s in self.specs.items()}

    def add(self, batch: dict[str, npt.NDArray[np.generic]]) -> None:
        """Append a batch of rows; its arrays must be exactly the declared ones."""
        if {n: (a.shape[1:], a.dtype.name) for n, a in batch.items()} != {
            n: (s.shape, s.dtype) for n, s in self.specs.items()
        }:
            got = {n: (a.shape, a.dtype.name) for n, a in batch.items()}
            raise ValueError(f"the codec gave {got}, declared are {self.specs}")
        rows = len(next(iter(batch.values())))
        for name, values in batch.items():
            self.arrays[name][self.filled : self.filled + rows] = values
        self.filled += rows


def commit_asked(store: Store, num_views: int, identity: str) -> None:
    """Say that so many views of every photo are asked for: before the first unit of them, so that a lost one shows."""
    there = set(store.names(ASKED_RECORDS))
    for view in range(num_views):
        if asked_record(view) not in there:
            AskedRecord(identity=identity, view=view).create(store, asked_record(view))


def commit_content(cache: Cache) -> None:
    """Say what the photos of a cache are, once all of its source shards were read to their end.

    Raises CacheError where they are others than those of which that was said before.
    """
    cache = Cache(cache.store, cache.manifest)  # other jobs may have finished shards meanwhile
    records = cache.source_records
    if len(records) == len(cache.shards):
        hashes = [records[shard].sha256 for shard in range(len(cache.shards))]
        ContentRecord(identity=cache.fingerprint, source_sha256=hashes).create(cache.store, CONTENT_RECORD)


def commit_views(
    store: Store,
    unit: Unit,
    crops: Sequence[Crop],
    skipped: Sequence[tuple[str, str]],
    identity: str,
    *,
    photos_sha256: str,
    notes: Sequence[tuple[str, str]] = (),
) -> ViewsRecord:
    """Write the tar of a unit and its record; return the record that counts.

    photos_sha256: `hash_photos` of all photos of the group. skipped, notes: (key, text) of photos of the group.
    """
    keys = [crop.key for crop in crops]
    crc32 = [zlib.crc32(crop.jpeg) for crop in crops]
    sizes = [len(crop.jpeg) for crop in crops]

    def record(payload: Payload | None, offsets: list[int]) -> ViewsRecord:
        return ViewsRecord(
            unit=str(unit),
            identity=identity,
            photos_sha256=photos_sha256,
            keys=keys,
            keys_sha256=hash_keys(keys),
            labels=[crop.label for crop in crops],
            offsets=offsets,
            sizes=sizes,
            crc32=crc32,
            payload=payload,
            skipped=[list(pair) for pair in skipped],
            notes=[list(pair) for pair in notes],
        )

    if not crops:
        return record(None, []).create(store, views_record(unit))
    return commit(
        store,
        views_record(unit),
        write=lambda path: _write_tar(path, crops, unit),
        name=lambda sha256: views_payload(unit, sha256),
        record=record,
    )


def commit_targets(
    store: Store, name: str, unit: Unit, targets: TargetArrays, views: ViewsRecord, identity: str, codec_sha256: str
) -> TargetRecord:
    """Write the arrays of a unit's targets and their record; return the record that counts."""
    if targets.filled != targets.count or targets.count != len(views.keys):
        raise ValueError(
            f"{unit}: {targets.filled} of {counted(targets.count, 'row')} for {counted(len(views.keys), 'crop')}"
        )

    def record(payload: Payload | None, blocks: dict[str, list[list[int]]]) -> TargetRecord:
        return TargetRecord(
            unit=str(unit),
            identity=identity,
            codec_sha256=codec_sha256,
            count=targets.count,
            keys_sha256=views.keys_sha256,
            views_sha256=views.payload.sha256 if views.payload else "",
            payload=payload,
            blocks=blocks,
        )

    # nothing that another cache of the same photos and settings would say otherwise
    about: dict[str, str | int] = {
        "format": FORMAT,
        "unit": str(unit),
        "target_set": identity,
        "codec_sha256": codec_sha256,
        "keys_sha256": views.keys_sha256,
        "views_sha256": views.payload.sha256 if views.payload else "",
    }
    if not targets.count:
        return record(None, {}).create(store, target_record(name, unit))
    return commit(
        store,
        target_record(name, unit),
        write=lambda path: write_zip(path, targets.arrays, targets.specs, about),
        name=lambda sha256: target_payload(name, unit, sha256),
        record=record,
    )


def put_payload(store: Store, draft: Path, name: Callable[[str], str]) -> Payload:
    """Give a finished draft the name that holds its hash."""
    sha256 = hash_file(draft)
    payload = Payload(name(sha256), draft.stat().st_size, sha256)
    store.put(draft, payload.name)
    return payload


def commit(
    store: Store,
    record_name: str,
    *,
    write: Callable[[Path], Any],
    name: Callable[[str], str],
    record: Callable[[Payload | None, Any], R],
) -> R:
    """Write a payload and its record; return the record that counts.

    `write` returns what `record` wants to know of the payload's inside.
    """
    with store.draft() as draft:
        inside = write(draft)
        payload = put_payload(store, draft, name)
    made = record(payload, inside)
    there = made.create(store, record_name)
    if there.payload is None or there.payload.name != payload.name:
        store.remove(payload.name)  # another job was first
    return there


def _write_tar(path: Path, crops: Sequence[Crop], unit: Unit) -> list[int]:
    """Write crops and their labels as WebDataset has them; return the position of each JPEG."""
    files = []
    for crop in crops:
        name = crop_name(crop.key, unit.view)
        if crop.label is not None:
            files.append((f"{name}{LABEL}", b"%d" % crop.label))
        files.append((f"{name}{CROP}", crop.jpeg))
    places = write_tar(path, files)
    return [place for (name, _), place in zip(files, places, strict=True) if name.endswith(CROP)]
