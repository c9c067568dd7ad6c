"""What every place of a cache gives. The cache's own code sees names and bytes only.

The contract that makes commits safe, on a disk as on an object store:

- a payload is filled as a local draft and appears under its name whole (`put`), durable before the call returns;
- `create` writes a small file unless one of that name exists, and says whether it did: of several writers one wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

MOST_WHOLE = 256 << 20
"""Bytes of the largest file that is read whole: cache.json of a million source shards. What is larger is no document of
ours, or a payload, which is read in pieces."""


class Store(Protocol):
    """Files of one cache by their names, which are paths relative to its root with '/' between the parts.

    Every method that touches a file checks its name first (`names.checked_name`) and raises CacheError for one that
    leads out of the root, wherever the name came from.
    """

    url: str
    """Root for people, without credentials."""
    address: str
    """Root with whatever credentials are in it: opens the store again, and is never shown."""
    folder: Path | None
    """Root where it is a local folder."""

    def place(self, name: str) -> str:
        """Return the full path or URL of a file, for messages."""

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None where there is none."""

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises FileNotFoundError, or OSError, also for more than MOST_WHOLE bytes."""

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read (offset, bytes) ranges of a file; a range beyond the end comes back short."""

    def names(self, folder: str) -> list[str]:
        """List all files below a folder, hidden ones left out, sorted; empty where there is none."""

    def entries(self, folder: str = "") -> list[str]:
        """List the files and folders directly in a folder (by default the root), hidden ones left out, sorted."""

    def draft(self) -> AbstractContextManager[Path]:
        """Give a local path to be filled with a payload; what was not `put` is removed at the end."""

    def put(self, draft: Path, name: str) -> None:
        """Give a finished draft its name, replacing what has it."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; say whether this call wrote it."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def drop_copy(self, name: str) -> bool:
        """Drop what is kept of a file elsewhere, having been found damaged; say whether to read it again."""

    def require_conditional_create(self) -> None:
        """Raise TecCacheError unless `create` lets one of several writers win."""

    def changed_after(self, name: str, folder: str) -> bool | None:
        """Say whether files came into a folder, or one right below it, or left it since a file was written.

        None where nobody can say. A copy of both may say so although nothing did.
        """

    def free(self) -> int | None:
        """Return the free bytes, None where nobody can say."""
