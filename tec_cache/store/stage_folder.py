"""A folder of copies with a bound that holds at every moment, shared by any number of threads, processes and runs."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from tec_cache.cache.layout import MANIFEST, digits_of
from tec_cache.store.drafts import abandoned, reserve, try_lock

_PART = ".part"
_MARK = ".tec-cache-stage"
"""Says that the copies in a folder are ours to remove: a cache's own payloads have such names too."""
_LOCK = ".lock"
_CACHE_HEAD = b'{"tec-cache":'
"""How the manifest of every cache and pack begins."""
_DEPTH = 3
"""Folders from a payload's own one up to that root, at most."""

TOUCH_SECONDS = 60.0
"""Between two notes of a copy's last use."""


class _Copy(NamedTuple):
    used: float
    size: int
    path: Path


class StageFolder:
    """Copies of payloads, at most `most_bytes` of them, unfinished ones included.

    Only what no run has used since this one began makes room, the least recently used first. Files that are not
    copies of payloads are neither counted nor touched.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._began = time.time()
        self._touched: dict[str, float] = {}

    def open(self) -> int:
        """Make the folder, if it is not there; return the bytes of the copies in it.

        Raises OSError, EEXIST for a folder of a cache, and for one with payloads that no stage has copied there.
        """
        for above in [self.folder.absolute(), *self.folder.absolute().parents][: _DEPTH + 1]:
            if _begins(above / MANIFEST, _CACHE_HEAD):
                raise OSError(errno.EEXIST, f"{above} is a cache, and no stage folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        copies = self._copies()
        if copies and not (self.folder / _MARK).exists():
            raise OSError(errno.EEXIST, f"{copies[0].path.name} is there, and this is no stage folder yet")
        (self.folder / _MARK).touch()
        with self._locked():
            return sum(copy.size for copy in self._copies())

    def touch(self, name: str) -> None:
        """Note that a copy is in use."""
        now = time.time()
        if now - self._touched.get(name, 0.0) > TOUCH_SECONDS:
            with suppress(FileNotFoundError):
                os.utime(self.folder / name, (now, now))
                self._touched[name] = now

    def add(self, name: str, size: int, fill: Callable[[IO[bytes]], object]) -> bool:
        """Add a copy of `size` bytes unless there is one; False where there is no room, or `fill` gives nothing true.

        Another process that is adding the same file is waited for. Raises OSError where the disk fails.
        """
        final, part = self.folder / name, self.folder / f".{name}{_PART}"
        while not final.exists():
            with self._locked():
                in_work = self._clear_parts(part)
                if not in_work and final.exists():
                    break  # finished since it was looked for
                if not in_work and not self._make_room(size):
                    return False
                stream = None if in_work else _reserved(part, size)
            if stream is None:
                time.sleep(0.05)
                continue
            with stream:
                try:
                    if not fill(stream) or stream.tell() != size:
                        return False
                    stream.flush()
                    # a disk's own clock may be some milliseconds behind, before the moment at which this run began
                    os.utime(part, (time.time(),) * 2)
                    os.replace(part, final)
                finally:
                    part.unlink(missing_ok=True)
        return True

    def drop(self, name: str) -> None:
        """Remove a copy."""
        (self.folder / name).unlink(missing_ok=True)

    def _copies(self) -> list[_Copy]:
        """List finished copies and unfinished ones, which have their full size from the beginning."""
        found = []
        for entry in os.scandir(self.folder):
            if digits_of(entry.name) is not None or _is_part(entry.name):
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    found.append(_Copy(stat.st_mtime, stat.st_size, Path(entry.path)))
        return found

    def _clear_parts(self, wanted: Path) -> bool:
        """Remove what killed processes left; say whether a living one is adding `wanted`."""
        for path in self.folder.glob(f".*{_PART}"):
            with suppress(FileNotFoundError):
                if _is_part(path.name) and abandoned(path):
                    path.unlink()
        return wanted.exists()

    def _make_room(self, size: int) -> bool:
        """Remove what nobody uses until `size` more bytes are within the bound; say whether they are."""
        copies = sorted(self._copies())
        held = sum(copy.size for copy in copies)
        idle = [copy for copy in copies if copy.used < self._began and copy.path.suffix != _PART]
        if held - sum(copy.size for copy in idle) + size > self.most_bytes:
            return False  # nothing is removed in vain
        for copy in idle:
            if held + size <= self.most_bytes:
                break
            copy.path.unlink(missing_ok=True)
            held -= copy.size
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other threads and processes from counting and making room for the length of the block."""
        with (self.folder / _LOCK).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _is_part(name: str) -> bool:
    """Say whether a name is that of an unfinished copy."""
    return name.startswith(".") and name.endswith(_PART) and digits_of(name[1 : -len(_PART)]) is not None


def _reserved(part: Path, size: int) -> IO[bytes]:
    """Create, lock and fill up an unfinished file. Raises OSError where the disk has no room."""
    stream = part.open("xb")
    try:
        try_lock(stream)
        reserve(stream, size)
    except BaseException:
        part.unlink()
        stream.close()
        raise
    return stream


def _begins(path: Path, head: bytes) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(head)) == head
    except OSError:
        return False
