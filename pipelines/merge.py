"""Caches that were made apart, on other machines or part by part, joined to one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from pipelines.extraction.storage import Needed, explained_storage
from tec_cache.cache import layout
from tec_cache.cache.copy import (
    copy_codec,
    copy_manifest,
    copy_payload,
    copy_source_record,
    require_codec,
    require_same_source,
)
from tec_cache.cache.identity import require_same
from tec_cache.cache.index.writing import refresh
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import SourceRecord, TargetRecord, ViewsRecord
from tec_cache.cache.remove import working
from tec_cache.cache.target_set import TargetSet
from tec_cache.cache.writer import commit_asked, commit_content
from tec_cache.errors import CacheError, ConfigError, listed
from tec_cache.pack.reader import Pack
from tec_cache.progress import Progress
from tec_cache.store import Store, open_store

R = TypeVar("R", ViewsRecord, TargetRecord)

TODO = "only parts of one cache can be merged: same photos, same settings of the views and of each target set"


@dataclass
class MergeSummary:
    """What was merged."""

    out: str
    fingerprint: str
    parts: list[str]
    views_copied: int = 0
    """Units of views."""
    targets_copied: int = 0
    """Units of targets."""
    already_there: int = 0
    """Units of either that OUT had, with the same content."""
    bytes: int = 0
    different: list[str] = field(default_factory=list)
    """Units that OUT had with other content; OUT's were kept."""
    refused: list[str] = field(default_factory=list)
    """Units of targets that were made from other crops than OUT's, and are missing now."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def merge(out: str, parts: Sequence[str], *, quiet: bool = True) -> MergeSummary:
    """Copy into a cache, new or not, what parts of it hold beyond it. The parts stay as they are.

    Everything that must be alike is compared before anything is written. Goes on where an earlier run stopped.
    Raises ConfigError, IdentityError, StorageError, or CacheError for a damaged part and, at the very end, for
    targets that do not fit OUT's crops.
    """
    store = open_store(out)
    caches = [_open(part) for part in parts]
    if any(cache.store.url == store.url for cache in caches):
        raise ConfigError("OUT is one of its own parts", where=out, todo="name only the others")
    if not caches:
        raise ConfigError("no part was named", todo="tec-cache merge OUT PART...")
    begun = [_open(out)] if store.size(layout.MANIFEST) is not None or store.size(layout.PACK) is not None else []
    sets = require_mergeable([*begun, *caches])
    summary = MergeSummary(store.url, caches[0].fingerprint, [cache.store.url for cache in caches])
    with explained_storage(store, Needed()), working(store):
        copy_manifest(caches[0].store, store, layout.MANIFEST, what="the cache", todo=TODO)
        for target in sets.values():
            name = layout.target_manifest(target.name)
            copy_manifest(target.cache.store, store, name, what=f"target set {target.name!r}", todo=TODO)
            copy_codec(target.cache, store, target.name)
        for part in caches:
            merge_part(part, store, summary, quiet)
        commit_content(_open(out))
        with Progress("index", noun="unit", quiet=quiet) as progress:
            refresh(_open(out), progress)
    if summary.refused:
        raise CacheError(
            f"targets made from other crops than those of OUT were left out: {listed(summary.refused)}",
            where=out,
            todo="run tec-cache extract on OUT, which makes the missing ones; all else is merged",
        )
    return summary


def _open(path: str) -> Cache:
    cache = open_cache(path)
    if isinstance(cache, Pack):
        raise ConfigError("this is a pack", where=path, todo="unpack it first: tec-cache unpack PACK CACHE")
    cache.require_current()
    return cache


def require_mergeable(caches: Sequence[Cache]) -> dict[str, TargetSet]:
    """Compare all that caches share; return each target set that was fitted, from the first that has it.

    Raises IdentityError naming the fields that differ.
    """
    sets: dict[str, TargetSet] = {}
    sources: dict[int, SourceRecord] = {}
    for cache in caches:
        where = cache.store.url
        require_same(caches[0].identity, cache.identity, what=f"the cache in {caches[0].store.url}", where=where,
                     todo=TODO)  # fmt: skip
        for target in fitted_sets(cache):
            first = sets.setdefault(target.name, target)
            what = f"target set {target.name!r} in {first.cache.store.url}"
            require_same(first.identity, target.identity, what=what, where=where, todo=TODO)
            require_codec(first.codec_record.payload, target.codec_record.payload, target.name, where)
        for shard in range(len(cache.shards)):
            record = cache.source_record(shard)
            if record is not None:
                place = cache.store.place(layout.source_record(shard))
                require_same_source(sources.setdefault(shard, record), record, place)
    return sets


def fitted_sets(cache: Cache) -> list[TargetSet]:
    """List the target sets that have a codec; one without has no units either."""
    names = [name for name in cache.target_names if cache.store.size(layout.codec_record(name)) is not None]
    return [cache[name] for name in names]


def merge_part(part: Cache, store: Store, summary: MergeSummary, quiet: bool) -> None:
    """Copy the units of one part: views, then the targets over them, then what is known of the source."""
    sets = fitted_sets(part)
    commit_asked(store, part.num_views, part.fingerprint)
    total = len(part.view_units) + sum(len(target.units) for target in sets)
    with Progress(f"merge {part.store.url}", total=total, noun="unit", quiet=quiet) as progress:
        for unit in part.view_units:
            record = part.views_record(unit)
            named = functools.partial(layout.views_payload, unit)
            done = _merge_unit(part.store, store, layout.views_record(unit), record, named, summary)
            summary.views_copied += done is not None
            progress.advance(1, done or 0)
        for target, unit in _units(sets):
            name = layout.target_record(target.name, unit)
            coded = target.record(unit)
            fits = store.size(name) is not None or _fits(store, unit, coded)
            if not fits:
                summary.refused.append(f"{target.name} {unit} of {part.store.url}")
            named = functools.partial(layout.target_payload, target.name, unit)
            done = _merge_unit(part.store, store, name, coded, named, summary) if fits else None
            summary.targets_copied += done is not None
            progress.advance(1, done or 0)
    for shard in range(len(part.shards)):
        copy_source_record(part.store, store, shard)


def _units(sets: list[TargetSet]) -> Iterator[tuple[TargetSet, Unit]]:
    for target in sets:
        for unit in target.units:
            yield target, unit


def _fits(store: Store, unit: Unit, coded: TargetRecord) -> bool:
    """Say whether targets were made from the very crops that OUT has."""
    views = ViewsRecord.read(store, layout.views_record(unit))
    return (coded.keys_sha256, coded.views_sha256) == (
        views.keys_sha256,
        views.payload.sha256 if views.payload else "",
    )


def _merge_unit(
    source: Store, store: Store, name: str, record: R, named: Callable[[str], str], summary: MergeSummary
) -> int | None:
    """Copy a unit, payload first, unless it is there; return its bytes, None where OUT's stays.

    named: gives the payload's name from its SHA-256.
    """
    if store.size(name) is None:
        payload = named(record.payload.sha256) if record.payload else ""
        if record.payload is not None:
            copy_payload(source, store, record.payload, payload)
        there, size = record.create(store, name), record.payload.size if record.payload else 0
        if there == record:
            summary.bytes += size
            return size
        if record.payload is not None and (there.payload is None or there.payload.name != payload):
            store.remove(payload)  # another job was first
    else:
        there = type(record).read(store, name)
    if there == record:
        summary.already_there += 1
    else:
        summary.different.append(f"{layout.what_of(name)} of {source.url}")
    return None
