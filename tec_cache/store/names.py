"""Names of files within a store. They come from records, listings and users: each is checked here before any use."""

from __future__ import annotations

from tec_cache.errors import CacheError

MOST_BYTES = 1024
"""Of a whole name: S3's longest key."""
MOST_PART_BYTES = 255
"""Of what lies between two slashes: the longest file name of the usual file systems."""


def checked_name(name: str, where: str) -> str:
    """Return a name that stays below the store's root, on a disk as on an object store.

    where: the store, for the message. Raises CacheError for anything else, without touching a file.
    """
    problem = _problem(name)
    if problem:
        todo = "nothing was touched: this cache was damaged, or made to do harm; get it from whoever made it again"
        raise CacheError(f"{name[:200]!r} cannot be a file of a cache: {problem}", where=where, todo=todo)
    return name


def _problem(name: str) -> str:
    parts = name.split("/")
    try:
        lengths = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "it is not UTF-8"
    if not all(lengths):
        return "it is absolute, or empty in part"
    if any(part in (".", "..") for part in parts):
        return "it leads out of its folder"
    if "\\" in name or ":" in name:
        return "it has a backslash or a colon"
    if not name.isprintable():
        return "it has control characters"
    if max(lengths) > MOST_PART_BYTES or sum(lengths) + len(parts) - 1 > MOST_BYTES:
        return "it is too long"
    return ""
