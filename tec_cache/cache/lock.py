"""One writer at a time: advisory locks that end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tec_cache.distributed import Ranks
from tec_cache.errors import TecCacheError

_RANGE = 1 << 30


@contextmanager
def writing(folder: Path, what: str, ranks: Ranks) -> Iterator[None]:
    """Keep other jobs from writing into `folder` for the length of the block.

    Each of a job's ranks locks its own share of a range of bytes, so ranks do not disturb each other, while any
    two jobs overlap somewhere, whatever their numbers of ranks. Raises TecCacheError where another job holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first, end = (_RANGE * i // ranks.world_size for i in (ranks.rank, ranks.rank + 1))
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, end - first, first, os.SEEK_SET)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise TecCacheError(
                    f"another job is writing {what}",
                    where=str(folder),
                    todo="wait until it is done, then run this command again: it makes what is left",
                ) from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            # a file system without locks: two jobs on one cache are then the user's own care
        yield
