"""The file of a shard where it lies: on a disk, in an object store, on a web server."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from typing import IO, Any, NamedTuple

from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from tec_cache.errors import SourceError, StorageError
from tec_cache.urls import scrubbed
from tec_cache.web import refusal_behind

END = 64 * 1024
"""Bytes at each end of a file that tell it from others."""

PIECE = 2**20
"""Bytes of a file without ranges that are read at a time."""


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


class RemoteFile(ShardFile):
    """A file of any file system that fsspec knows."""

    def __init__(self, fs: Any, address: str, where: str, parts: tuple[str, ...], size: int | None = None) -> None:
        self.fs, self.address, self.where, self.parts = fs, address, where, parts
        self._size = size
        """Its bytes, once they are known."""

    def size(self) -> int:
        """Return its bytes: one request, unless a listing has told them."""
        if self._size is None:
            info = self.fs.info(self.address)
            kind = {"directory": "a folder", "other": "something special"}.get(info.get("type"))
            if kind is not None:
                folder = self.where.rstrip("/")
                todo = f"give a pattern of the files in it: '{folder}/*.tar', or '{folder}/*.parquet'"
                raise SourceError(f"this is {kind}, not a file", where=self.where, todo=todo)
            self._size = int(info["size"]) if info.get("size") is not None else self._count().size
        return self._size

    def open(self) -> IO[bytes]:
        """Open it."""
        stream: IO[bytes] = self.fs.open(self.address, "rb")
        return stream

    def ends(self) -> Ends:
        """Read both ends by a request each, a small file by one."""
        size = self.size()
        if size <= 2 * END:
            data = self._range(0, size)
            return Ends(size, data[:END], data[-END:])
        return Ends(size, self._range(0, END), self._range(size - END, size))

    def neighbours(self) -> list[str]:
        """List its folder, where that can be listed."""
        try:
            folder = self.address.partition("?")[0].rpartition("/")[0]
            return [str(path).rstrip("/").rpartition("/")[2] for path in self.fs.ls(folder, detail=False)]
        except Exception:  # a server that lists nothing: what was asked for is not there in any case
            return []

    def _range(self, start: int, end: int) -> bytes:
        data = self.part(start, end) if end > start else b""
        if len(data) != end - start:
            what = f"{len(data):,} bytes came where {end - start:,} were asked for"
            raise StorageError(what, where=self.where, todo="check the store")
        return data

    def part(self, start: int, end: int) -> bytes:
        """Read some bytes by one request."""
        # a file system without a way of its own opens the file, and then reads megabytes ahead (the hub's does)
        opens = type(self.fs).cat_file is AbstractFileSystem.cat_file and not isinstance(self.fs, AsyncFileSystem)
        return bytes(self.fs.cat_file(self.address, start=start, end=end, **({"block_size": 1} if opens else {})))

    def _count(self) -> Ends:
        """Read the whole file, piece by piece, for its size and its ends."""
        size, first, last = 0, b"", b""
        with self.open() as stream:
            while piece := stream.read(PIECE):
                size += len(piece)
                if len(first) < END:
                    first = (first + piece)[:END]
                last = (last + piece)[-END:]
        return Ends(size, first, last, whole=True)


class WebFile(RemoteFile):
    """A file of a web server, of which nobody knows beforehand whether it gives parts of a file."""

    _ranges: bool | None = None
    """Whether it does, once that was tried."""

    def size(self) -> int:
        """Return its bytes. Raises FileNotFoundError only where the server says that there is no such file."""
        try:
            return super().size()
        except FileNotFoundError as error:
            cause = refusal_behind(error)
            if cause is None:
                raise
            todo = "check the address and the network"
            if getattr(cause, "status", None) in (401, 403):
                todo = "check the password or the signature in the URL, which may have expired"
            raise StorageError(
                f"the shard cannot be reached: {self.explained(cause)}", where=self.where, todo=todo
            ) from error

    def open(self) -> IO[bytes]:
        """Open it: block by block where the server gives parts of a file, else as one long answer."""
        if self._ranges is None:
            self._ranges = self._gives_parts()
        # without a size fsspec would ask for it once more
        stream: IO[bytes] = (
            self.fs.open(self.address, "rb", size=self._size)
            if self._ranges
            else self.fs.open(self.address, "rb", block_size=0, size=self._size)
        )
        return stream

    def ends(self) -> Ends:
        """Read both ends by a request each, or the whole file where the server gives no parts of it."""
        try:
            ends = super().ends()
            self._ranges = True
        except ValueError:  # what fsspec says of a server that answers with the whole file
            self._ranges, ends = False, self._count()
            if ends.size != self._size:
                what = f"{ends.size:,} bytes came of a file of {self._size or 0:,}"
                raise StorageError(what, where=self.where, todo="check the server") from None
        return ends

    def _gives_parts(self) -> bool:
        """Ask for the last byte."""
        if self._size:
            try:
                self._range(self._size - 1, self._size)
            except ValueError:
                return False
        return bool(self._size)

    def part(self, start: int, end: int) -> bytes:
        """Read some bytes by one request."""
        # not cat_file: that takes a whole file into memory where a server answers with one
        with self.fs.open(self.address, "rb", size=self._size, cache_type="none") as stream:
            stream.seek(start)
            return bytes(stream.read(end - start))


def unreadable_shard(error: Exception, file: ShardFile) -> StorageError:
    """Say that a disk or a network fails: that must not be recorded as the damage of a shard."""
    todo = "check the disk or the network; what is finished is kept, the same command goes on"
    return StorageError(f"the shard cannot be read: {file.explained(error)}", where=file.where, todo=todo)
