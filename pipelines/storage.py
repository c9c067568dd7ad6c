"""A disk that is full, read-only or gone, in words a user can act on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from tec_cache.errors import GO_ON, StorageError, TecCacheError
from tec_cache.progress import human_bytes
from tec_cache.store import Store

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Needed:
    """What the running stage has written and still has to write, kept for the message of a full disk."""

    def __init__(self) -> None:
        self.stage = ""
        self.rows_left = 0
        self.rows_done = 0
        self.bytes_done = 0
        self.most_per_row = 0

    def begin(self, stage: str, rows: int, most_per_row: int) -> None:
        """A stage begins with so many rows, each at most so many bytes before compression."""
        self.stage, self.rows_left, self.most_per_row = stage, rows, most_per_row
        self.rows_done = self.bytes_done = 0

    def wrote(self, rows: int, num_bytes: int) -> None:
        """A unit was committed, or found to be there: 0 bytes, which say nothing of those that are still to come."""
        self.rows_left -= rows
        self.rows_done += rows if num_bytes else 0
        self.bytes_done += num_bytes

    @property
    def num_bytes(self) -> float:
        """Bytes still needed, from what was written so far, or at most where nothing was."""
        per_row = self.bytes_done / self.rows_done if self.rows_done else self.most_per_row
        return self.rows_left * per_row


@contextmanager
def explained_storage(store: Store, needed: Needed) -> Iterator[None]:
    """Turn an OSError of the cache's disk or store into a StorageError that says what is missing."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or store.url)
        if error.errno in _FULL:
            free = store.free()
            have = f", {human_bytes(free)} are free" if free is not None else ""
            more = "more is needed"
            if needed.num_bytes:
                more = f"about {human_bytes(needed.num_bytes)} more are needed for the {needed.stage}"
            what = f"the disk is full: {more}{have}"
            todo = f"make room, or move the cache to a larger disk; {GO_ON}"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            what = f"the cache cannot be written: there is a file in the way ({error.strerror})"
            raise TecCacheError(what, where=where, todo="name a folder, or a new one: --cache DIR") from error
        else:
            what = f"the cache cannot be written: {error.strerror or error}"
            todo = f"check the disk and its permissions, or choose another --cache; {GO_ON}"
        raise StorageError(what, where=where, todo=todo) from error
