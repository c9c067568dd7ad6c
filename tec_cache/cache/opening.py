"""From a path or URL to what can be read there: a cache, or a pack of one."""

from __future__ import annotations

from pathlib import Path

from tec_cache.cache import layout, version1
from tec_cache.cache.manifest import read_manifest
from tec_cache.cache.reader import Cache
from tec_cache.errors import ConfigError
from tec_cache.pack.reader import open_pack
from tec_cache.store import open_store


def open_cache(path: str | Path) -> Cache:
    """Open a cache, or a pack of one, in a folder or at a URL.

    Raises ConfigError if there is none, CacheError if it is damaged.
    """
    store = version1.adapted(open_store(path))
    if store.size(layout.PACK) is not None:
        return open_pack(store)
    if store.size(layout.MANIFEST) is None:
        raise ConfigError(
            "there is no cache here",
            where=str(path),
            todo="make one: tec-cache extract SHARDS --cache DIR --base mae",
        )
    return Cache(store, read_manifest(store, layout.MANIFEST))
