"""Unfinished files beside a store: each is locked by the process that fills it, so those of killed ones can be told."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PREFIX = "tec-cache-draft-"
_OURS = re.compile(PREFIX + "[0-9a-f]{32}")
YOUNG_SECONDS = 60.0
"""A file younger than this may not be locked yet by the process that has just created it."""


@contextmanager
def temporary_file() -> Iterator[Path]:
    """Give a new file on the temporary disk for the length of the block; clear what killed processes left there."""
    folder = Path(tempfile.gettempdir())
    clear_abandoned(folder)
    path = folder / f"{PREFIX}{uuid.uuid4().hex}"
    with path.open("xb") as stream:
        try_lock(stream)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def clear_abandoned(folder: Path) -> None:
    """Remove the drafts that no living process holds."""
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process's, or gone by now
            status = path.lstat()
            ours = _OURS.fullmatch(path.name) and stat.S_ISREG(status.st_mode)
            if ours and time.time() - status.st_mtime >= YOUNG_SECONDS and abandoned(path):
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
