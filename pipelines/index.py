"""What all records of a finished cache or pack say, in one file for each kind: large caches then open at once."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.extraction.storage import Needed, explained_storage
from tec_cache.cache.index.writing import refresh
from tec_cache.cache.opening import open_cache
from tec_cache.cache.remove import working
from tec_cache.errors import CacheError
from tec_cache.progress import Progress


@dataclass
class IndexSummary:
    """What was indexed."""

    cache: str
    num_views: int
    units: int
    """Of views."""
    targets: dict[str, int]
    """Target set -> views in which it is whole, and indexed; 0 for one that is not begun or lacks units everywhere."""
    written: list[str]
    """Files."""
    bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def index(path: str, *, quiet: bool = True) -> IndexSummary:
    """Make the index of a finished cache or pack anew from its records, every one of which is checked on the way.

    Target sets that are not finished are indexed as far as they are whole views. Raises ConfigError where there is no
    cache or one of format version 1, CacheError where units are missing or a record is damaged, or StorageError.
    """
    begin, cache = time.monotonic(), open_cache(path)
    cache.require_current()
    with explained_storage(cache.store, Needed()), working(cache.store):
        cache.require_complete(cache.num_views)
        with Progress("index", noun="unit", quiet=quiet) as progress:
            written = refresh(cache, progress, anew=True)
    cache = open_cache(path)
    if cache.index is None:  # somebody removes or makes units at this moment
        raise CacheError(
            f"the index does not fit what is there now: {cache.index_problem or 'it is gone'}",
            where=cache.store.url,
            todo="wait until no other job writes here, then run the same command again",
        )
    sets = {name: cache[name].index for name in cache.target_names}
    return IndexSummary(
        cache=cache.store.url,
        num_views=cache.index.heading.num_views,
        units=len(cache.index),
        targets={name: found.heading.num_views if found else 0 for name, found in sets.items()},
        written=written,
        bytes=sum(cache.store.size(name) or 0 for name in written),
        seconds=time.monotonic() - begin,
    )
