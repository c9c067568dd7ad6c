"""A cache as self-contained WebDataset shards, one tar for each unit, and back."""

from __future__ import annotations

import math
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import webdataset as wds

from pipelines.extraction.storage import Needed, explained_storage
from tec_cache.cache import layout
from tec_cache.cache.copy import copy_codec, copy_manifest, copy_source_record
from tec_cache.cache.index.writing import refresh
from tec_cache.cache.layout import BLOCK_ROWS, Unit, crop_name
from tec_cache.cache.manifest import ensure_manifest
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import PackedCodes, PackRecord, Payload, ViewsRecord
from tec_cache.cache.remove import working
from tec_cache.cache.target_set import TargetSet
from tec_cache.cache.writer import commit
from tec_cache.device import available_cores
from tec_cache.errors import ConfigError
from tec_cache.pack.frames import arrays_json, hash_arrays, write_member
from tec_cache.pack.reader import Pack
from tec_cache.printable import counted
from tec_cache.progress import Progress
from tec_cache.store import Store, open_store

MEMBER = "tec"
"""A target set's members end in NAME.tec."""


@dataclass
class PackSummary:
    """What was packed."""

    cache: str
    pack: str
    fingerprint: str
    num_views: int
    targets: list[str]
    units: int = 0
    units_made: int = 0
    """By this run; the others were there already."""
    samples: int = 0
    bytes: int = 0
    """Of all tars."""
    bytes_per_sample: float = 0.0
    codes: dict[str, float] = field(default_factory=dict)
    """Target set -> bytes of its codes per sample."""
    cache_bytes: float = 0.0
    """Of the same units in the cache, per sample."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def pack(
    cache: str, out: str, *, targets: Sequence[str] = (), num_views: int | None = None, quiet: bool = True
) -> PackSummary:
    """Write the first views of a finished cache, and some (or all) of its target sets, as WebDataset tars.

    Goes on where an earlier run stopped. Raises ConfigError, CacheError, IdentityError for another cache's pack
    in `out`, or StorageError.
    """
    opened, store = open_cache(cache), open_store(out)
    if isinstance(opened, Pack):
        raise ConfigError("this is a pack already", where=cache, todo="unpack it first: tec-cache unpack PACK CACHE")
    opened.require_current()
    if store.size(layout.PACK) is None and store.size(layout.MANIFEST) is not None:
        raise ConfigError("there is a cache here, not a pack", where=out, todo="name another OUT")
    names = sorted(set(targets or opened.target_names))
    sets = [opened[name] for name in names]
    views = opened.num_views if num_views is None else num_views
    if not 1 <= views <= max(1, opened.num_views):
        raise ConfigError(
            f"the cache has {counted(opened.num_views, 'view')}", where=cache, todo="give --views up to that number"
        )
    refuse_alike(names)
    for name in (None, *names):
        opened.require_complete(views, name)
    summary = PackSummary(opened.store.url, store.url, opened.fingerprint, views, names)
    with explained_storage(store, Needed()), working(store):
        _begin(opened, sets, views, store)
        units = [unit for unit in opened.view_units if unit.view < views]
        with (
            ThreadPoolExecutor(available_cores(), thread_name_prefix="frames") as pool,
            Progress("pack", total=len(units), noun="unit", quiet=quiet) as progress,
        ):
            for unit in units:
                made = store.size(layout.pack_record(unit)) is None
                if made:
                    pack_unit(opened, sets, unit, store, pool)
                record = PackRecord.read(store, layout.pack_record(unit))
                _count(summary, record, made=made)
                progress.advance(1, record.payload.size if made and record.payload else 0)
            refresh(open_cache(out), progress)
    if summary.samples:
        summary.bytes_per_sample = summary.bytes / summary.samples
        summary.cache_bytes /= summary.samples
        summary.codes = {name: size / summary.samples for name, size in summary.codes.items()}
    return summary


def refuse_alike(names: list[str]) -> None:
    """Refuse sets whose names differ in their letters' case only: WebDataset reads members' endings without it."""
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            what = f"target sets {seen[name.lower()]!r} and {name!r} cannot be told apart in one pack"
            raise ConfigError(what, todo="pack them one by one, with --target")
        seen[name.lower()] = name


def _begin(cache: Cache, sets: list[TargetSet], num_views: int, store: Store) -> None:
    """Write pack.json, or check that this very pack was begun; copy what is not the samples' own."""
    targets = {
        target.name: {
            "fingerprint": target.fingerprint,
            "codec_sha256": _codec_sha256(target),
            "arrays": arrays_json(target.codec.arrays(target.spec)),
        }
        for target in sets
    }
    identity = {"cache": cache.fingerprint, "num_views": num_views, "block_rows": BLOCK_ROWS, "targets": targets}
    todo = "name another OUT, or give --target and --views as they were"
    ensure_manifest(store, layout.PACK, identity, {}, what="the pack", todo=todo)
    for shard in range(len(cache.shards)):
        copy_source_record(cache.store, store, shard)
    assert cache.content_record is not None  # of a complete cache
    cache.content_record.create(store, layout.CONTENT_RECORD)
    for target in sets:
        copy_manifest(cache.store, store, layout.target_manifest(target.name), what="the target set", todo=todo)
        copy_codec(cache, store, target.name)
    copy_manifest(cache.store, store, layout.MANIFEST, what="the cache", todo=todo)


def pack_unit(cache: Cache, sets: list[TargetSet], unit: Unit, store: Store, pool: ThreadPoolExecutor) -> PackRecord:
    """Write the tar of a unit and its record; return the record that counts."""
    views = cache.views_record(unit)
    members: dict[str, list[bytes]] = {}
    made: dict[str, dict[str, Any]] = {}
    for target in sets:
        coded = target.record(unit, views)
        arrays = target.read_unit(coded)
        specs = target.codec.arrays(target.spec)

        def member(row: int, arrays: Any = arrays, specs: Any = specs) -> bytes:
            return write_member({name: values[row] for name, values in arrays.items()}, specs, views.crc32[row])

        members[target.name] = list(pool.map(member, range(coded.count)))
        made[target.name] = {
            "identity": coded.identity,
            "codec_sha256": coded.codec_sha256,
            "payload": coded.payload,
            "arrays_sha256": hash_arrays(arrays),
            "sizes": [len(data) for data in members[target.name]],
            "crc32": [zlib.crc32(data) for data in members[target.name]],
        }

    def record(payload: Payload | None, offsets: dict[str, list[int]]) -> PackRecord:
        codes = {name: PackedCodes(**entry, offsets=offsets.get(name, [])) for name, entry in made.items()}
        own = views.values() | {"payload": payload, "offsets": offsets.get("", [])}
        return PackRecord(**own, views=views.payload, targets=codes)

    if not views.keys:
        return record(None, {}).create(store, layout.pack_record(unit))
    crops = _crops(cache, views)
    return commit(
        store,
        layout.pack_record(unit),
        write=lambda path: _write_tar(path, views, crops, members, unit),
        name=lambda sha256: layout.pack_payload(unit, sha256),
        record=record,
    )


def _crops(cache: Cache, views: ViewsRecord) -> list[bytes]:
    """Read all crops of a unit, in the pieces of the blocks."""
    blocks = math.ceil(len(views.keys) / BLOCK_ROWS)
    return [crop for number in range(blocks) for crop in cache.read_block(views, number, (), ())[0]]


def _write_tar(
    path: Path, views: ViewsRecord, crops: list[bytes], members: dict[str, list[bytes]], unit: Unit
) -> dict[str, list[int]]:
    """Write samples as plain WebDataset; return the positions of the JPEGs (under "") and of each set's members."""
    with path.open("wb") as stream:
        # long keys with a set's name behind them may need more than the 100 characters of plain tar
        with wds.TarWriter(stream, user="", group="", mtime=0, encoder=False, format="PAX_FORMAT") as tar:
            for row, (key, crop) in enumerate(zip(views.keys, crops, strict=True)):
                fields = {"__key__": crop_name(key, unit.view), "jpg": crop}
                if views.labels[row] is not None:
                    fields["cls"] = str(views.labels[row]).encode()
                tar.write(fields | {f"{name}.{MEMBER}": codes[row] for name, codes in members.items()})
    endings = {"jpg": ""} | {f"{name}.{MEMBER}": name for name in members}
    offsets: dict[str, list[int]] = {name: [] for name in endings.values()}
    with tarfile.open(path) as written:
        for info in written:
            ending = info.name.rpartition("/")[2].partition(".")[2]
            if ending in endings:
                offsets[endings[ending]].append(info.offset_data)
    return offsets


def _codec_sha256(target: TargetSet) -> str:
    payload = target.codec_record.payload
    return payload.sha256 if payload else ""


def _count(summary: PackSummary, record: PackRecord, *, made: bool) -> None:
    """Add a unit to the summary; sums are made averages at the end."""
    summary.units += 1
    summary.units_made += made
    summary.samples += len(record.keys)
    summary.bytes += record.payload.size if record.payload else 0
    summary.cache_bytes += record.views.size if record.views else 0
    for name, codes in record.targets.items():
        summary.codes[name] = summary.codes.get(name, 0) + sum(codes.sizes)
        summary.cache_bytes += codes.payload.size if codes.payload else 0
