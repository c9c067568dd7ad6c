"""The file of a shard in an object store or on a web server.

Image processes import the files of a disk only: fsspec would delay their start.
"""

from __future__ import annotations

from typing import IO, Any

from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from tec_cache.data.files import END, Ends, ShardFile
from tec_cache.errors import SourceError, StorageError
from tec_cache.web import refusal_behind

PIECE = 2**20
"""Bytes of a file without ranges that are read at a time."""


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
