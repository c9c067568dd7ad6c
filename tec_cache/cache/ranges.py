"""Byte ranges that a record gives: compared with what can be there before anything is read, or allocated, for them."""

from __future__ import annotations

from collections.abc import Sequence

from tec_cache.cache.record import MEND, Payload
from tec_cache.errors import CacheError
from tec_cache.store import Store

SLACK = 1 << 20
"""Bytes between the members of a tar that are read beside them, in one piece."""

Ranges = Sequence[tuple[int, int]]
"""(offset, bytes) of each."""


def require_ranges(ranges: Ranges, payload: Payload, most: int, where: str, todo: str) -> None:
    """Raise CacheError unless each range lies within the payload and has at most `most` bytes."""
    for offset, size in ranges:
        if offset < 0 or not 0 < size <= most or offset + size > payload.size:
            what = f"a record asks for {size:,} bytes at {offset:,} of {payload.size:,}; at most {most:,} make sense"
            raise CacheError(what, where=where, todo=todo)


def read_together(store: Store, name: str, ranges: Ranges) -> list[bytes]:
    """Read rising ranges: in one piece where little else lies between them, else one by one. Raises OSError."""
    start, stop = ranges[0][0], ranges[-1][0] + ranges[-1][1]
    if not 0 <= stop - start <= 2 * sum(size for _, size in ranges) + SLACK:
        return store.read_ranges(name, ranges)
    (piece,) = store.read_ranges(name, [(start, stop - start)])
    return [piece[offset - start : offset - start + size] for offset, size in ranges]


def unreadable(what: str, where: str, error: OSError, todo: str = MEND) -> CacheError:
    """Say that a file is gone or cannot be read."""
    gone = "are gone" if isinstance(error, FileNotFoundError) else "cannot be read"
    return CacheError(f"{what} {gone}: {error.strerror or error}", where=where, todo=todo)
