"""Removing from a cache: records first, so that nothing is ever there whose payload is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.lock import CacheLock, cache_lock
from tec_cache.cache.record import CodecRecord, PackRecord, TargetRecord, ViewsRecord
from tec_cache.errors import CacheError
from tec_cache.store import Store
from tec_cache.store.local import LocalStore


@contextmanager
def working(store: Store, *, dry_run: bool = False) -> Iterator[CacheLock]:
    """Write beside other jobs; whoever is alone, at the beginning or the end, clears what killed jobs left."""
    if dry_run:
        yield CacheLock(None, store.url)
        return
    with cache_lock(store) as lock:
        lock.share()
        for step in ("begin", "end"):
            if store.folder is not None and lock.try_own():
                clear_leftovers(store)
            lock.share()
            if step == "begin":
                yield lock


def remove_all(store: Store) -> int:
    """Remove what this project wrote into a cache, and nothing else; return the bytes."""
    names = [*store.names("records"), layout.MANIFEST, *store.names(layout.TARGETS), *store.names(layout.VIEWS)]
    return _remove(store, [name for name in names if is_ours(name)])


def remove_target_set(store: Store, name: str, *, dry_run: bool = False) -> int:
    """Remove a target set; return the bytes.

    target.json goes before codec.json: without it there is no set, and what is left of one is a leftover.
    """
    folder = f"{layout.TARGETS}/{name}"
    names = [
        *store.names(layout.target_records(name)),
        layout.target_manifest(name),
        layout.codec_record(name),
        *(path for path in store.names(folder) if is_ours(path)),
    ]
    return _remove(store, names, dry_run=dry_run)


def remove_views(store: Store, keep: int, units: list[Unit], target_names: list[str], *, dry_run: bool = False) -> int:
    """Remove units of views and all targets over them; return the bytes.

    keep: views that are asked for from then on, which is said before anything else goes.
    """
    wanted = set(units)
    names = store.names(layout.ASKED_RECORDS)
    records = [name for name in names if (view := layout.asked_view(name)) is not None and view >= keep]
    records += [layout.target_record(name, unit) for name in target_names for unit in units]
    records += [layout.views_record(unit) for unit in units]
    payloads = [
        name
        for folder in (layout.TARGETS, layout.VIEWS)
        for name in store.names(folder)
        if layout.unit_of(name) in wanted
    ]
    return _remove(store, [*records, *payloads], dry_run=dry_run)


def clear_leftovers(store: Store) -> list[str]:
    """Remove what killed jobs left: drafts, and payloads that no record names. Only while nobody else writes.

    Returns the names of the removed payloads. A payload without a record is cheap to tell by its name; the record
    itself is read only where a unit has several.
    """
    if isinstance(store, LocalStore):
        store.clear_drafts()
    sets = {name.split("/")[1] for name in store.names(layout.TARGETS)}
    left = _unnamed(store, store.names(layout.VIEWS), layout.VIEW_RECORDS, ViewsRecord)
    for target in sets:
        names = store.names(f"{layout.TARGETS}/{target}")
        if layout.target_manifest(target) in names:
            left += _unnamed(store, names, layout.target_records(target), TargetRecord) + _other_codecs(store, names)
        elif not store.names(layout.target_records(target)):  # a set that was removed, but not to its end
            left += [name for name in names if is_ours(name)]
    if store.size(layout.PACK) is not None:
        tars = [name for name in store.names("") if "/" not in name]
        left += _unnamed(store, tars, layout.PACK_RECORDS, PackRecord)
    for name in left:
        store.remove(name)
    return left


def _unnamed(
    store: Store, names: list[str], records: str, kind: type[ViewsRecord] | type[TargetRecord] | type[PackRecord]
) -> list[str]:
    """List the payloads of units that no record in the folder `records` names."""
    recorded = set(store.names(records))
    by_unit: dict[str, list[str]] = {}
    for name in names:
        unit = layout.unit_of(name)
        if unit is not None:
            by_unit.setdefault(f"{records}/{unit}.json", []).append(name)
    left = []
    for record, payloads in by_unit.items():
        if record not in recorded:
            # asked again: a listing may be older than the record
            left += payloads if store.size(record) is None else []
        elif len(payloads) > 1:
            payload = kind.read(store, record).payload
            left += [name for name in payloads if payload is None or name != payload.name]
    return left


def _other_codecs(store: Store, names: list[str]) -> list[str]:
    """List the parameters of a codec that codec.json, which is among the names if at all, does not name."""
    record = next((name for name in names if name.endswith("/codec.json")), None)
    try:
        payload = CodecRecord.read(store, record).payload if record else None
    except CacheError:
        return []  # nobody can say which are named; --overwrite and rm must work all the same
    fitted = [name for name in names if is_ours(name) and name.endswith(".safetensors")]
    lost = record is None or (payload is not None and payload.name not in names)
    if fitted and lost and store.names(layout.target_records(fitted[0].split("/")[1])):
        return []  # damage: what the finished units were coded with may be among them
    return [name for name in fitted if payload is None or name != payload.name]


def is_ours(name: str) -> bool:
    """Say whether a file of a cache bears a name of the format: only such files are ever removed."""
    return (
        name == layout.MANIFEST
        or layout.unit_of(name) is not None
        or name.startswith("records/")
        or name.rpartition("/")[2].startswith(("target.json", "codec."))
    )


def _remove(store: Store, names: list[str], *, dry_run: bool = False) -> int:
    total = 0
    for name in dict.fromkeys(names):
        total += store.size(name) or 0
        if not dry_run:
            store.remove(name)
    return total
