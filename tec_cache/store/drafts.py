"""Unfinished files beside a store: each is locked by the process that fills it, so those of killed ones can be told."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PREFIX = "tec-cache-draft-"
YOUNG_SECONDS = 60.0
"""A file younger than this may not be locked yet by the process that has just created it."""


@contextmanager
def temporary_file() -> Iterator[Path]:
    """Give a new file on the temporary disk for the length of the block; clear what killed processes left there."""
    folder = Path(tempfile.gettempdir())
    clear_abandoned(folder, PREFIX)
    path = folder / f"{PREFIX}{uuid.uuid4().hex}"
    with path.open("xb") as stream:
        try_lock(stream)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def clear_abandoned(folder: Path, prefix: str, young: float = YOUNG_SECONDS) -> None:
    """Remove the files of a prefix that no living process holds."""
    for path in folder.glob(f"{prefix}*"):
        with suppress(OSError):  # another process's, or gone by now
            if time.time() - path.stat().st_mtime >= young and abandoned(path):
                path.unlink()


def abandoned(path: Path) -> bool:
    """Say whether no living process fills a file. Raises OSError where it is gone."""
    with path.open("rb") as stream:
        return try_lock(stream)


def try_lock(stream: IO[bytes]) -> bool:
    """Lock an open file, until it is closed, against all that open it anew; say whether nobody was first."""
    try:
        # flock, not lockf: that would end as soon as this process closes the file anywhere
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def reserve(stream: IO[bytes], size: int) -> None:
    """Give a new file its full size at once. Raises OSError where the disk has no room for it."""
    try:
        os.posix_fallocate(stream.fileno(), 0, size)
    except AttributeError:  # not on every system
        stream.truncate(size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        stream.truncate(size)  # not on every disk
