"""A disk that is full, read-only or gone, in words a user can act on."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tec_cache.errors import GO_ON, StorageError, TecCacheError
from tec_cache.progress import human_bytes
from tec_cache.store import Store

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Needed:
    """What is still to be written: for the message of a full disk, and for the time that is left.

    How many photos there are is not known before they are read, so what is left of the source is told by its size
    (bytes of tars, photos of a folder), and what that will give by what the part that was read has given.
    """

    def __init__(self) -> None:
        self.source_left = 0.0
        """Size of what is not cut yet."""
        self.most_per_size = 0
        """Bytes of crops that one of it gives at most; 0 where nobody can say."""
        self.targets_left = 0
        """Rows over crops that are there."""
        self.most_per_target = 0
        """Bytes, before compression; 0 where no targets are made."""
        self._source_cut = 0.0
        self._crops = self._crop_bytes = self._targets = self._target_bytes = 0
        self._lock = threading.Lock()

    def passed(self, size: float, crops: int = 0, num_bytes: int = 0) -> None:
        """So much of the source is done and gave crops; none, where they were there already."""
        with self._lock:
            self.source_left = max(0.0, self.source_left - size)
            self._source_cut += size if crops else 0.0
            self._crops += crops
            self._crop_bytes += num_bytes
            self.targets_left += crops if self.most_per_target else 0

    def coded(self, rows: int, num_bytes: int = 0) -> None:
        """Targets were written, or found to be there: 0 bytes, which say nothing of those that are still to come."""
        with self._lock:
            self.targets_left -= rows
            self._targets += rows if num_bytes else 0
            self._target_bytes += num_bytes

    @property
    def crops_expected(self) -> float:
        """Crops that are still to come, as far as anybody can say."""
        return self._crops / self._source_cut * self.source_left if self._source_cut else 0.0

    @property
    def bytes_by_stage(self) -> dict[str, float]:
        """Bytes still needed, from what was written so far, or at most where nothing was."""
        per_size = self._crop_bytes / self._source_cut if self._source_cut else self.most_per_size
        per_target = self._target_bytes / self._targets if self._targets else self.most_per_target
        rows = self.targets_left + self.crops_expected if self.most_per_target else 0.0
        return {"views": self.source_left * per_size, "targets": rows * per_target}


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
            stages = [(stage, size) for stage, size in needed.bytes_by_stage.items() if size]
            more = " and ".join(f"about {human_bytes(size)} more are needed for the {stage}" for stage, size in stages)
            more = more or "more is needed"
            what = f"the disk is full: {more}{have}"
            todo = f"make room, or move the cache to a larger disk; {GO_ON}"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            what = f"the cache cannot be written: there is a file in the way ({error.strerror})"
            raise TecCacheError(what, where=where, todo="name a folder, or a new one: --cache DIR") from error
        else:
            what = f"the cache cannot be written: {error.strerror or error}"
            todo = f"check the disk and its permissions, or choose another --cache; {GO_ON}"
        raise StorageError(what, where=where, todo=todo) from error
