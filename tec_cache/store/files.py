"""Local files that are there whole or not at all, even after a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_durably(
    path: Path, write: Callable[[IO[bytes]], object], *, once: bool = False, drafts: Path | None = None
) -> bool:
    """Let `write` fill a file, sync it, and only then give it its name.

    once: leave a file that is there already, and return False; safe among several processes. drafts: folder on
    the same disk for the unfinished file.
    """
    make_folder(path.parent)
    folder = path.parent if drafts is None else make_folder(drafts)
    draft = draft_of(folder / path.name)
    try:
        with draft.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if once:
            _link(draft, path)
        else:
            os.replace(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def draft_of(path: Path) -> Path:
    """Return a path beside one for its unfinished content, another one each time."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def drafts_of(names: str) -> re.Pattern[str]:
    """Return the pattern of the names that `draft_of` gives for files whose names have a pattern."""
    return re.compile(rf"\.(?:{names})\.[0-9a-f]{{12}}\.tmp")


def _link(draft: Path, path: Path) -> None:
    """Name a file unless the name is taken (FileExistsError), which rename would not notice."""
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # a disk without hard links: two jobs that write one name at one moment are then the user's own care
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from error
        os.replace(draft, path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file durably, in place of one that is there."""
    write_durably(path, lambda stream: stream.write(data))


def make_folder(folder: Path) -> Path:
    """Create a folder and those above it, each name durable; return it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    return folder


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
