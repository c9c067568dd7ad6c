"""Who may write and who may remove: advisory locks that end with the process that holds them.

Writers share a cache: each commits units of its own, and of two that make the same unit one wins. Removing
(--overwrite, rm, repair, and the clearing of what killed jobs left) wants the cache for itself. An object store
has no locks; there, removing while others write is the user's own care.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tec_cache.cache.layout import DRAFTS, LOCK
from tec_cache.distributed import Ranks
from tec_cache.errors import TecCacheError
from tec_cache.store import Store
from tec_cache.store.files import make_folder

PATIENCE = 60.0
"""Seconds that a writer waits: every job has the cache alone for a moment, to clear what killed jobs left."""

RUN_PATIENCE = 30.0
"""Seconds that a job waits for a run's folder: torchrun and SLURM give a job that they end as long for its last
checkpoint, and the one that goes on may start meanwhile."""

_RANGE = 1 << 30
_TODO = "wait until it is done, then run this command again"


class CacheLock:
    """A job's hold on a cache: on its lock file, or on nothing where there can be none."""

    def __init__(self, path: Path | None, where: str) -> None:
        self._path, self._where = path, where
        self._file = None if path is None else _opened(path)

    def share(self) -> None:
        """Write beside other writers. Raises TecCacheError where another job is still removing after a while."""
        end = time.monotonic() + PATIENCE
        while not self._try(fcntl.LOCK_SH):
            if time.monotonic() > end:
                raise TecCacheError("another job is removing parts of this cache", where=self._where, todo=_TODO)
            time.sleep(0.05)

    def own(self) -> None:
        """Have the cache alone. Raises TecCacheError while any other job writes, as far as anybody can say."""
        if self.works and not self.try_own():
            raise TecCacheError("another job is writing to this cache", where=self._where, todo=_TODO)

    def try_own(self) -> bool:
        """Have the cache alone if it is certain that nobody else writes; say whether it is."""
        return self.works and self._try(fcntl.LOCK_EX)

    @property
    def works(self) -> bool:
        """Whether locks tell of other jobs at all: object stores have none, nor have some network file systems."""
        return self._file is not None and _lock(self._file, fcntl.LOCK_SH) is not None

    def close(self) -> None:
        """Let go of the cache."""
        if self._file is not None:
            self._file.close()

    def _try(self, kind: int) -> bool:
        while self._path is not None and self._file is not None:
            if _lock(self._file, kind) is False:
                return False
            if os.fstat(self._file.fileno()).st_nlink:
                return True
            # a job that began nothing took it away between our opening and locking it
            self._file.close()
            make_folder(self._path.parent)
            self._file = _opened(self._path)
        return True


@contextmanager
def cache_lock(store: Store) -> Iterator[CacheLock]:
    """Open a lock on a cache, not held yet, for the length of the block.

    If the block fails and no cache lies there, the lock is taken away again, and so are folders made for it.
    """
    if store.folder is None:
        yield CacheLock(None, store.url)
        return
    made = [folder for folder in (store.folder, *store.folder.parents) if not folder.is_dir()]
    make_folder(store.folder)
    lock = CacheLock(store.folder / LOCK, store.url)
    try:
        yield lock
    except BaseException:
        with suppress(OSError):  # somebody else has put something there, or taken the folder away
            names = os.listdir(store.folder)
            if {LOCK} <= set(names) <= {LOCK, DRAFTS} and lock.try_own():
                if DRAFTS in names:
                    (store.folder / DRAFTS).rmdir()
                (store.folder / LOCK).unlink()
                for folder in made:
                    folder.rmdir()
        raise
    finally:
        lock.close()


@contextmanager
def writing(folder: Path, what: str, ranks: Ranks) -> Iterator[None]:
    """Keep other jobs from writing into a run's folder for the length of the block.

    Each of a job's ranks locks its own share of a range of bytes, so ranks do not disturb each other, while any
    two jobs overlap somewhere, whatever their numbers of ranks. Raises TecCacheError where another job holds it and
    does not end within a while.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first, end = (_RANGE * i // ranks.world_size for i in (ranks.rank, ranks.rank + 1))
    with (folder / LOCK).open("ab") as file:
        deadline = time.monotonic() + RUN_PATIENCE
        while _lock(file, fcntl.LOCK_EX, end - first, first) is False:
            if time.monotonic() > deadline:
                raise TecCacheError(f"another job is writing {what}", where=str(folder), todo=_TODO)
            time.sleep(0.05)
        yield


def _opened(path: Path) -> IO[bytes]:
    # no link is followed: in a stranger's cache it could lead to any file
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "r+b", buffering=0)


def _lock(file: IO[bytes], kind: int, length: int = 0, start: int = 0) -> bool | None:
    """Lock a range of a file without waiting; say whether nobody was in the way, None where there are no locks."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB, length, start, os.SEEK_SET)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return None  # two jobs on one folder are then the user's own care
    return True
