"""A pack back to the cache that it was made of, byte for byte."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.extraction.storage import Needed, explained_storage
from tec_cache.cache import layout
from tec_cache.cache.copy import checked_pieces, copy_codec, copy_manifest, copy_source_record, require_name
from tec_cache.cache.index.writing import refresh
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.record import PackRecord, TargetRecord, ViewsRecord
from tec_cache.cache.remove import working
from tec_cache.cache.writer import Crop, TargetArrays, commit_asked, commit_content, commit_targets, commit_views
from tec_cache.errors import CacheError, ConfigError
from tec_cache.pack.frames import hash_arrays
from tec_cache.pack.reader import MEND, Pack, PackedTargetSet
from tec_cache.progress import Progress
from tec_cache.store import Store, open_store


@dataclass
class UnpackSummary:
    """What was unpacked."""

    pack: str
    cache: str
    fingerprint: str
    num_views: int
    targets: list[str]
    units: int = 0
    units_made: int = 0
    """By this run; the others were there already."""
    rewritten: int = 0
    """Files of equal content, but of other bytes than the original cache's: another release wrote those."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def unpack(pack: str, out: str, *, quiet: bool = True) -> UnpackSummary:
    """Make the cache of a pack again. Every byte of the pack is checked on the way.

    Goes on where an earlier run stopped. Raises ConfigError, CacheError, IdentityError or StorageError.
    """
    opened, store = open_cache(pack), open_store(out)
    if not isinstance(opened, Pack):
        raise ConfigError("this is a cache, not a pack", where=pack, todo="give a folder that tec-cache pack made")
    if store.size(layout.PACK) is not None:
        raise ConfigError("there is a pack here, not a cache", where=out, todo="name another CACHE")
    opened.require_current()
    num_views, todo = opened.num_views, "name another CACHE"
    opened.require_complete(num_views)
    summary = UnpackSummary(opened.store.url, store.url, opened.fingerprint, num_views, opened.target_names)
    with explained_storage(store, Needed()), working(store):
        copy_manifest(opened.store, store, layout.MANIFEST, what="the cache", todo=todo)
        for name in opened.target_names:
            manifest = layout.target_manifest(name)
            copy_manifest(opened.store, store, manifest, what=f"target set {name!r}", todo=todo)
            copy_codec(opened, store, name)
        commit_asked(store, num_views, opened.fingerprint)
        with Progress("unpack", total=len(opened.view_units), noun="unit", quiet=quiet) as progress:
            for unit in opened.view_units:
                record = opened.views_record(unit)
                summary.units += 1
                if any(store.size(name) is None for name in _records(record, unit)):
                    unpack_unit(opened, unit, record, store)
                    summary.units_made += 1
                summary.rewritten += _rewritten(store, unit, record)
                progress.advance(1, record.payload.size if record.payload else 0)
        for shard in range(len(opened.shards)):
            copy_source_record(opened.store, store, shard)
        commit_content(open_cache(out))
        with Progress("index", noun="unit", quiet=quiet) as progress:
            refresh(open_cache(out), progress)
    return summary


def unpack_unit(pack: Pack, unit: Unit, record: PackRecord, store: Store) -> None:
    """Write the tar and the zips of a unit, and their records. Raises CacheError for any damage."""
    if record.payload is not None:
        where = pack.store.place(layout.pack_record(unit))
        require_name(record.payload, layout.pack_payload(unit, record.payload.sha256), where)
        deque(checked_pieces(pack.store, record.payload, MEND), maxlen=0)
    views = _unpack_views(pack, unit, record, store)
    for name in pack.target_names:
        if store.size(layout.target_record(name, unit)) is not None:
            continue
        target = pack[name]
        assert isinstance(target, PackedTargetSet)
        coded = target.record(unit, record)
        values = target.read_unit(coded)
        if hash_arrays(values) != record.targets[name].arrays_sha256:
            where = f"{pack.store.url}, unit {unit}"
            raise CacheError(f"the decoded codes of {name!r} are not those that were packed", where=where, todo=MEND)
        arrays = TargetArrays(coded.count, target.codec.arrays(target.spec))
        if coded.count:
            arrays.add(values)
        commit_targets(store, name, unit, arrays, views, coded.identity, coded.codec_sha256)


def _unpack_views(pack: Pack, unit: Unit, record: PackRecord, store: Store) -> ViewsRecord:
    """Write the tar of a unit unless it is there; return its record."""
    name = layout.views_record(unit)
    if store.size(name) is not None:
        there = ViewsRecord.read(store, name)
        own = (record.keys, record.crc32, record.labels, record.photos_sha256)
        if (there.keys, there.crc32, there.labels, there.photos_sha256) != own:
            raise ConfigError(f"unit {unit} here has other crops", where=store.place(name), todo="name another CACHE")
        return there
    blocks = range(-(-len(record.keys) // BLOCK_ROWS))
    jpegs = [jpeg for number in blocks for jpeg in pack.read_block(record, number, (), ())[0]]
    crops = [Crop(*entry) for entry in zip(record.keys, jpegs, record.labels, strict=True)]
    skipped, notes = ([(key, text) for key, text in pairs] for pairs in (record.skipped, record.notes))
    return commit_views(store, unit, crops, skipped, record.identity, photos_sha256=record.photos_sha256, notes=notes)


def _records(record: PackRecord, unit: Unit) -> list[str]:
    return [layout.views_record(unit), *(layout.target_record(name, unit) for name in record.targets)]


def _rewritten(store: Store, unit: Unit, record: PackRecord) -> int:
    """Count the files of a unit that are not byte for byte the original's."""
    there = [ViewsRecord.read(store, layout.views_record(unit)).payload]
    there += [TargetRecord.read(store, layout.target_record(name, unit)).payload for name in record.targets]
    original = [record.views, *(codes.payload for codes in record.targets.values())]
    return sum(a != b for a, b in zip(there, original, strict=True))
