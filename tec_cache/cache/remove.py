"""Removing from a cache: the index, then records first, so that nothing is ever there whose payload is not.

Only files that this program provably wrote go: those whose whole name the format makes (`layout.file_of`), and of
the few documents whose names other programs use as well (cache.json, target.json, codec.json) only those that are
sealed as ours are. Everything else stays, byte for byte; folders go when they are empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import NamedTuple

from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.listing import units_in
from tec_cache.cache.lock import CacheLock, cache_lock
from tec_cache.cache.manifest import read_manifest
from tec_cache.cache.record import CodecRecord, PackRecord, TargetRecord, ViewsRecord
from tec_cache.cache.sealed import MAGIC
from tec_cache.errors import CacheError, ConfigError, listed
from tec_cache.store import Store
from tec_cache.store.local import LocalStore

_DOCUMENTS = ("manifest", "pack", "target", "codec")
"""Kinds of files whose names alone do not say that they are ours."""
_NO_FILES = ("lost+found",)
"""What lies in the root of an empty disk."""


class Removed(NamedTuple):
    """What a removal did."""

    num_bytes: int
    left: list[str]
    """Files in the same folders that are not ours: they are still there."""


@contextmanager
def working(store: Store, *, dry_run: bool = False) -> Iterator[CacheLock]:
    """Write beside other jobs; whoever is alone, at the beginning or the end, clears what killed jobs left.

    A cache that is begun and of which nothing is made goes again: a command that is refused leaves nothing behind.
    Raises ConfigError for a folder that holds other files and no cache.
    """
    refuse_foreign_folder(store)
    fresh = store.size(layout.MANIFEST) is None
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
                try:
                    yield lock
                except BaseException:
                    if fresh:
                        _take_back(store, lock)
                    raise


def _take_back(store: Store, lock: CacheLock) -> None:
    """Remove a cache that has nothing but settings, if it is certain that nobody else is about to add to it."""
    with suppress(OSError):  # there is an error to be told already
        if store.folder is None or not lock.try_own():
            return
        files = [layout.file_of(name) for name in _names(store) if name not in (layout.LOCK, layout.DRAFTS)]
        if all(file is not None and file.kind in ("manifest", "target") for file in files):
            remove_all(store)


def refuse_foreign_folder(store: Store) -> None:
    """Raise ConfigError unless a folder holds a cache or a pack of ours, what is left of one, or nothing at all.

    A cache wants a folder of its own: that nobody's files are among its own is what makes removing safe.
    """
    manifests = [name for name in (layout.MANIFEST, layout.PACK) if store.size(name) is not None]
    for name in manifests:
        if not _looks_ours(store, name):
            todo = "name another folder for the cache; or restore the file, if it is a damaged one of yours"
            raise ConfigError("tec-cache did not write this file", where=store.place(name), todo=todo)
    if manifests:
        return
    names = _names(store)
    if names and not any(map(layout.file_of, names)):
        what = f"there is no cache here, and there are other files: {listed(names, most=4)}"
        raise ConfigError(what, where=store.url, todo="name a new or an empty folder for the cache")


def foreign_files(store: Store) -> list[str]:
    """List what lies in a cache and has no name of this format; a folder of others by its own name alone."""
    return [name for name in _names(store) if layout.file_of(name) is None]


def _names(store: Store) -> list[str]:
    """List what lies in the root, and below the folders of a cache."""
    folders = (layout.VIEWS, layout.TARGETS, layout.SAMPLES, layout.INDEX, layout.RECORDS)
    others = [name for name in store.entries() if name not in folders and name not in _NO_FILES]
    return others + [name for folder in folders for name in store.names(folder)]


def remove_all(store: Store) -> Removed:
    """Remove what this project wrote into a cache, and nothing else."""
    return _remove(store, [*store.names(layout.INDEX), *store.names(layout.RECORDS), layout.MANIFEST,
                           *store.names(layout.TARGETS), *store.names(layout.VIEWS)])  # fmt: skip


def remove_target_set(store: Store, name: str, *, dry_run: bool = False) -> Removed:
    """Remove a target set.

    target.json goes before codec.json: without it there is no set, and what is left of one is a leftover.
    """
    index, first = layout.target_index(name), [layout.target_manifest(name), layout.codec_record(name)]
    others = [path for path in store.names(layout.target_folder(name)) if path not in first]
    return _remove(store, [index, *store.names(layout.target_records(name)), *first, *others], dry_run=dry_run)


def remove_views(
    store: Store, keep: int, units: Iterable[Unit], target_names: list[str], *, dry_run: bool = False
) -> int:
    """Remove units of views and all targets over them; return the bytes, but for those of the index, which goes first
    and can be made again of the units that stay.

    keep: views that are asked for from then on, which is said before anything else goes.
    """
    units = list(units)
    wanted = set(units)
    names = store.names(layout.ASKED_RECORDS)
    asked = {name: file.number for name in names if (file := layout.file_of(name)) is not None}
    records = [name for name, view in asked.items() if view is not None and view >= keep]
    records += [layout.target_record(name, unit) for name in target_names for unit in units]
    records += [layout.views_record(unit) for unit in units]
    payloads = [
        name
        for folder in (layout.TARGETS, layout.VIEWS)
        for name in store.names(folder)
        if layout.unit_of(name) in wanted
    ]
    if not dry_run and any(store.size(name) is not None for name in (*records, *payloads)):
        remove_index(store)
    return _remove(store, [*records, *payloads], dry_run=dry_run).num_bytes


def remove_index(store: Store) -> None:
    """Remove what an index says of all units, before any of them goes."""
    _remove(store, store.names(layout.INDEX))


def clear_leftovers(store: Store) -> list[str]:
    """Remove what killed jobs left: drafts, and payloads that no record names. Only while nobody else writes.

    Returns the names of the removed payloads. A payload without a record is cheap to tell by its name; the record
    itself is read only where a unit has several. Without a manifest of ours nothing is known to be a leftover.
    """
    if isinstance(store, LocalStore):
        store.clear_drafts()
    left: list[str] = []
    packed = _ours(store, layout.PACK)
    if packed:
        left = _unnamed(store, store.names(layout.SAMPLES), PackRecord)
    elif _ours(store, layout.MANIFEST):
        left = _unnamed(store, store.names(layout.VIEWS), ViewsRecord)
    if packed or _ours(store, layout.MANIFEST):
        names = store.names(layout.TARGETS)
        for target in sorted({file.target for name in names if (file := layout.file_of(name)) is not None}):
            left += _left_of_set(store, target, [name for name in names if name.split("/")[1] == target], packed)
    for name in store.names(layout.INDEX):
        file = layout.file_of(name)
        if file is not None and file.target and store.size(layout.target_manifest(file.target)) is None:
            left.append(name)
    for name in left:
        store.remove(name)
    return left


def _left_of_set(store: Store, target: str, names: list[str], packed: bool) -> list[str]:
    """List what no record names of the files of one target set, or of one that was not removed to its end."""
    if layout.target_manifest(target) in names:
        return _other_codecs(store, names) + ([] if packed else _unnamed(store, names, TargetRecord))
    if packed or units_in(store, layout.target_records(target)):
        return []  # damage, which a user can mend
    return [name for name in names if provably_ours(store, name)]


def _unnamed(
    store: Store, names: list[str], kind: type[ViewsRecord] | type[TargetRecord] | type[PackRecord]
) -> list[str]:
    """List the payloads of units that no record names."""
    by_record: dict[str, list[str]] = {}
    for name in names:
        file = layout.file_of(name)
        if file is not None and file.unit is not None:
            by_record.setdefault(file.record, []).append(name)
    recorded = {name for folder in {record.rpartition("/")[0] for record in by_record} for name in store.names(folder)}
    left = []
    for record, payloads in by_record.items():
        if record not in recorded:
            # asked again: a listing may be older than the record
            left += payloads if store.size(record) is None else []
        elif len(payloads) > 1:
            payload = kind.read(store, record).payload
            left += [name for name in payloads if payload is None or name != payload.name]
    return left


def _other_codecs(store: Store, names: list[str]) -> list[str]:
    """List the parameters of a codec that codec.json, which is among the names if at all, does not name."""
    files = {name: file for name in names if (file := layout.file_of(name)) is not None}
    record = next((name for name, file in files.items() if file.kind == "codec"), None)
    try:
        payload = CodecRecord.read(store, record).payload if record else None
    except CacheError:
        return []  # nobody can say which are named; --overwrite and rm must work all the same
    fitted = [name for name, file in files.items() if file.kind == "parameters"]
    lost = record is None or (payload is not None and payload.name not in names)
    if fitted and lost and units_in(store, layout.target_records(files[fitted[0]].target)):
        return []  # damage: what the finished units were coded with may be among them
    return [name for name in fitted if payload is None or name != payload.name]


def provably_ours(store: Store, name: str) -> bool:
    """Say whether a file in a folder that is no target set's (any more) is ours by its name and its content."""
    file = layout.file_of(name)
    if file is None:
        return False
    if file.kind == "parameters":
        try:
            return sha256(store.read(name)).hexdigest()[:16] == name.split(".")[-2]
        except OSError:
            return False
    return file.kind not in _DOCUMENTS or _ours(store, name)


def _ours(store: Store, name: str) -> bool:
    """Say whether cache.json, pack.json, target.json or codec.json is there, whole, and one that we wrote."""
    if store.size(name) is None:
        return False
    file = layout.file_of(name)
    try:
        if file is not None and file.kind == "codec":
            CodecRecord.read(store, name)
        else:
            read_manifest(store, name)
    except CacheError:
        return False
    return True


def _looks_ours(store: Store, name: str) -> bool:
    """Say whether a document is one of ours, be it damaged: it begins as all of them do, or holds nothing at all."""
    try:
        (head,) = store.read_ranges(name, [(0, 4096)])
    except OSError:
        return False
    begins = b"".join(head.split()).startswith
    return begins(MAGIC) or begins(b'{"body":{') or not head.strip(b"\0")


def _remove(store: Store, names: list[str], *, dry_run: bool = False) -> Removed:
    """Remove what is ours of some files; say which are not."""
    ours, left = {}, []
    for name in dict.fromkeys(names):
        file = layout.file_of(name)
        size = None if file is None else store.size(name)
        if file is None or (size is not None and not _removable(store, name, file)):
            left.append(name)
        elif size is not None:
            ours[name] = size
    for name in ours if not dry_run else ():
        store.remove(name)
    return Removed(sum(ours.values()), left)


def _removable(store: Store, name: str, file: layout.File) -> bool:
    """Say whether a file that a user asked to remove is ours, be it damaged."""
    if file.kind == "parameters" and not _looks_ours(store, layout.target_manifest(file.target)):
        return provably_ours(store, name)
    return file.kind not in _DOCUMENTS or _looks_ours(store, name)
