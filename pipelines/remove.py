"""Remove a target set, or the later views, from a cache; nothing else is touched."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.extraction.storage import Needed, explained_storage
from tec_cache.cache import layout
from tec_cache.cache.index.writing import refresh
from tec_cache.cache.layout import Unit
from tec_cache.cache.lock import CacheLock, cache_lock
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.cache.remove import clear_leftovers, remove_target_set, remove_views
from tec_cache.errors import ConfigError, nearest
from tec_cache.pack.reader import Pack
from tec_cache.progress import Progress
from tec_cache.store import Store


@dataclass
class RemoveSummary:
    """What was removed, or would be, and what is left."""

    cache: str
    removed: str
    units: int = 0
    """Of views and of targets."""
    bytes: int = 0
    left_views: int = 0
    left_units: int = 0
    left_targets: dict[str, int] = field(default_factory=dict)
    """Target set -> units."""
    left_alone: list[str] = field(default_factory=list)
    """Files in the target set's folders that are not ours: they stay."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def remove(
    cache: str, *, target: str | None = None, views: int | None = None, dry_run: bool = False, quiet: bool = True
) -> RemoveSummary:
    """Remove one target set, or all views after the first `views` and the targets over them.

    Records go first: a job that is killed leaves a smaller valid cache, and files that nobody reads, which this or
    the next command on the cache clears. Raises ConfigError without a choice, or TecCacheError while others write.
    """
    if (target is None) == (views is None):
        raise ConfigError("what is to be removed?", todo="give either --target NAME or --views N (views to keep)")
    if views is not None and views < 1:
        raise ConfigError(f"--views {views}", todo="keep at least one view; to remove everything, remove the folder")
    opened = open_cache(cache)
    if isinstance(opened, Pack):
        raise ConfigError("a pack is not changed", where=cache, todo="pack the smaller cache into another folder")
    store = opened.store
    names = set_names(store)
    if target is not None and target not in names:
        raise ConfigError(
            f"there is no target set {target!r}{nearest(target, names)}",
            where=cache,
            todo=f"it has: {', '.join(names) or 'none'}",
        )
    locked = nullcontext(CacheLock(None, store.url)) if dry_run else cache_lock(store)
    with explained_storage(store, Needed()), locked as lock:
        lock.own()
        if target is not None:
            records = [name for name in store.names(layout.target_records(target)) if layout.file_of(name)]
            summary = RemoveSummary(store.url, f"target set {target!r}", len(records))
            summary.bytes, summary.left_alone = remove_target_set(store, target, dry_run=dry_run)
        else:
            assert views is not None
            later = sorted((unit for unit in _all_units(store) if unit.view >= views), reverse=True)
            summary = RemoveSummary(store.url, f"views from number {views} on")
            records = [*store.names(layout.VIEW_RECORDS), *store.names(layout.TARGET_RECORDS)]
            summary.units = sum(_view(name) >= views for name in records)
            summary.bytes = remove_views(store, views, later, names, dry_run=dry_run)
        if not dry_run:
            clear_leftovers(store)
            with Progress("index", noun="unit", quiet=quiet) as progress:
                refresh(Cache(store, opened.manifest), progress)
        _what_is_left(summary, Cache(store, opened.manifest), target, views)
    return summary


def set_names(store: Store) -> list[str]:
    """List the target sets of which anything is there, even where a removal did not come to its end."""
    names = [name for folder in (layout.TARGETS, layout.TARGET_RECORDS) for name in store.names(folder)]
    return sorted({file.target for name in names if (file := layout.file_of(name)) is not None})


def _all_units(store: Store) -> set[Unit]:
    """List the units of which any record or payload is there."""
    names = [name for folder in (layout.RECORDS, layout.VIEWS, layout.TARGETS) for name in store.names(folder)]
    return {unit for name in names if (unit := layout.unit_of(name)) is not None}


def _view(name: str) -> int:
    unit = layout.unit_of(name)
    return -1 if unit is None else unit.view


def _what_is_left(summary: RemoveSummary, cache: Cache, target: str | None, views: int | None) -> None:
    """Fill in what the cache holds afterwards; after a dry run, what it would."""
    kept = [unit for unit in cache.view_units if views is None or unit.view < views]
    summary.left_units = len(kept)
    summary.left_views = max((unit.view + 1 for unit in kept), default=0)
    for name in cache.target_names:
        if name != target:
            summary.left_targets[name] = sum(views is None or unit.view < views for unit in cache.committed(name))
