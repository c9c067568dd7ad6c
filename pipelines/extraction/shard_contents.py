"""Before stage one goes on: are the source shards those whose views are in the cache?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tec_cache.cache.reader import Cache
from tec_cache.cache.record import SourceRecord
from tec_cache.data.contents import Contents, read_contents
from tec_cache.data.files import END
from tec_cache.data.photos import Shard
from tec_cache.errors import CacheError, IdentityError
from tec_cache.progress import Progress

_FIELDS = ("size", "ends_sha256")


def look_at_contents(shards: Sequence[Shard], *, quiet: bool) -> None:
    """Read the contents of all shards, with a line of progress where that takes its time. Raises StorageError."""
    whole = 0
    with Progress("source", total=len(shards), noun="shard", quiet=quiet) as progress:

        def each(contents: Contents) -> None:
            nonlocal whole
            whole += contents.num_read > 2 * END
            note = f"{whole} read whole, their server gives no parts of a file" if whole else ""
            progress.advance(1, contents.num_read, note)

        read_contents(shards, each)


def same_contents(
    cache: Cache, shards: Sequence[Shard], entries: list[dict[str, Any]], *, overwrite: bool
) -> list[dict[str, Any]]:
    """Compare shards with those of a cache; return their entries in its identity.

    A shard that was read to its end must be the one that was read. One that was not may have been mended since, as an
    error about it asks for: it keeps the entry with which the cache was begun, and when it is read its photos are
    compared group by group. A cache of an older format says nothing of contents. Raises IdentityError naming the
    shard, unless the cache may be replaced.
    """
    stored, result = cache.identity["source"]["shards"], []
    for number, (shard, entry) in enumerate(zip(shards, entries, strict=True)):
        old = stored[number] if number < len(stored) else {}
        # other names of photos are the identity's to tell, class by class
        same_names = all(old.get(field) == entry.get(field) for field in ("name", "files_sha256"))
        if same_names and "ends_sha256" in old:
            record = _record(cache, number, overwrite=overwrite)
            known = old["ends_sha256"] if record is None else record.ends_sha256
            if record is not None and known != entry["ends_sha256"] and not overwrite:
                raise _changed(shard, record)
            if record is None or known == entry["ends_sha256"]:
                entry = entry | {field: old[field] for field in _FIELDS}
        result.append(entry)
    return result


def _record(cache: Cache, number: int, *, overwrite: bool) -> SourceRecord | None:
    """Return the record of a shard that was read to its end; a damaged one is none where it may be replaced."""
    try:
        return cache.source_record(number)
    except CacheError:
        if not overwrite:
            raise
        return None


def _changed(shard: Shard, record: SourceRecord) -> IdentityError:
    noun = "bytes" if shard.in_bytes else "photos"
    if record.size != shard.size:
        how = f"{record.size:,} {noun} when its views were made, {shard.size:,} now"
    else:
        how = f"it has as many {noun} as when its views were made, but holds other photos"
    return IdentityError(
        f"source shard {shard.name} has changed: {how}",
        where=shard.place,
        todo="restore it, name another --cache, or replace the cache with --overwrite",
    )
