"""The file of a shard: what every kind of it gives, and the one on a disk."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from typing import IO, NamedTuple

from tec_cache.errors import SourceError, StorageError
from tec_cache.urls import scrubbed

END = 64 * 1024
"""Bytes at each end of a file that tell it from others."""


class Ends(NamedTuple):
    """A file's size, and its first and last bytes: END of each, or the whole file where it is smaller."""

    size: int
    first: bytes
    last: bytes
    whole: bool = False
    """Whether the whole file was read for them."""


class ShardFile(ABC):
    """One file. `where` shows its place without credentials; `parts` are the parts of its path, for its name."""

    where: str
    parts: tuple[str, ...]
    address: str
    """Its path or URL with all that is in it: opens it, and is never shown."""

    @abstractmethod
    def size(self) -> int:
        """Return its bytes. Raises FileNotFoundError, SourceError where it is no file, OSError."""

    @abstractmethod
    def open(self) -> IO[bytes]:
        """Open it to be read from its beginning to its end."""

    @abstractmethod
    def ends(self) -> Ends:
        """Read its first and last bytes."""

    @abstractmethod
    def part(self, start: int, end: int) -> bytes:
        """Read the bytes from `start` to `end`, or to its end where that comes first."""

    @abstractmethod
    def neighbours(self) -> list[str]:
        """Name what lies in the same folder, as far as that can be listed: for `did you mean`."""

    def explained(self, error: BaseException) -> str:
        """Return what went wrong as text without credentials: network libraries put whole URLs into theirs."""
        return scrubbed(f"{type(error).__name__}: {error}", self.address)


class LocalFile(ShardFile):
    """A file on a disk. Nothing else is opened: reading a FIFO would wait forever, reading a device never ends."""

    def __init__(self, path: str) -> None:
        self.address = self.where = path
        self.parts = tuple(part for part in path.split("/") if part not in ("", "."))

    def size(self) -> int:
        """Return its bytes."""
        return self._checked(os.stat(self.address)).st_size

    def open(self) -> IO[bytes]:
        """Open it; what has taken its place since it was found is looked at again."""
        handle = os.open(self.address, os.O_RDONLY | os.O_NONBLOCK)
        try:
            self._checked(os.fstat(handle))
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise

    def ends(self) -> Ends:
        """Read both ends with a `pread` each."""
        with self.open() as stream:
            size = os.fstat(stream.fileno()).st_size
            last = max(0, size - END)
            return Ends(size, os.pread(stream.fileno(), END, 0), os.pread(stream.fileno(), END, last))

    def part(self, start: int, end: int) -> bytes:
        """Read some bytes with a `pread`."""
        with self.open() as stream:
            return os.pread(stream.fileno(), end - start, start)

    def neighbours(self) -> list[str]:
        """List its folder."""
        try:
            return os.listdir(os.path.dirname(self.address) or ".")
        except OSError:
            return []

    def _checked(self, found: os.stat_result) -> os.stat_result:
        kind = kind_of(found.st_mode)
        if kind:
            todo = "give files, or a pattern that matches nothing else"
            raise SourceError(f"this is {kind}, not a file", where=self.where, todo=todo)
        return found


def kind_of(mode: int) -> str:
    """Say what a path is that is not a file; empty for a file."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return "" if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "something special")


def unreadable_shard(error: Exception, file: ShardFile) -> StorageError:
    """Say that a disk or a network fails: that must not be recorded as the damage of a shard."""
    todo = "check the disk or the network; what is finished is kept, the same command goes on"
    return StorageError(f"the shard cannot be read: {file.explained(error)}", where=file.where, todo=todo)
