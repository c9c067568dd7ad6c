"""Where a cache lies: a folder, or any URL that fsspec knows. `store.py` has what both give."""

from __future__ import annotations

from pathlib import Path

from tec_cache.store.local import LocalStore
from tec_cache.store.store import MOST_WHOLE, Store

__all__ = ["MOST_WHOLE", "Store", "is_url", "open_store"]


def is_url(path: str) -> bool:
    """Say whether a path names something that only fsspec can reach."""
    return "://" in path and not path.startswith("file://")


def open_store(path: str | Path) -> Store:
    """Return the store of a folder (which need not exist) or URL. Raises ConfigError for an unknown kind of URL."""
    if not is_url(str(path)):
        return LocalStore(Path(str(path).removeprefix("file://")))
    from tec_cache.store.remote import RemoteStore  # fsspec takes a while to import, and a folder needs none

    return RemoteStore(str(path))
