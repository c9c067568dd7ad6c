"""The bytes of a tar in order, unpacked where it is compressed: never more at a time than is asked for."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from tec_cache.data.files import LocalFile, ShardFile, unreadable_shard
from tec_cache.tar_headers import MOST_HEADER_BYTES, StrictHeader

PIECE = 1 << 20
"""Bytes that are read of a compressed file at a time."""
MOST_EXPANSION = 200
"""How many times its own bytes a compressed tar may hold, beyond the first FREE_EXPANSION of them. Photos hardly
shrink; uncompressed pictures of one colour shrink a thousandfold, but no whole shard is made of those."""
FREE_EXPANSION = 256 << 20
MOST_EMPTY = 64
"""Reads beyond the end of a file: some are made of every tar, to look for its end marker."""
XZ_MEMORY = 256 << 20
"""Bytes that a xz file's dictionary may ask for; 65 MiB at xz's highest level."""


class Members:
    """The headers of a tar in order, each checked; a member's bytes are read before the next header is asked for."""

    def __init__(self, tar: tarfile.TarFile, source: _Counted | _Local) -> None:
        self.tar, self._source = tar, source
        self.compressed = source.compressed

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        while (info := self._next()) is not None:
            self.tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header
            yield info

    def _next(self) -> tarfile.TarInfo | None:
        # in a stream: the rest of the member before, and one header
        self._source.most = self.tar.offset + MOST_HEADER_BYTES  # type: ignore[attr-defined]
        info = self.tar.next()
        self._source.most = None
        return info

    def read(self, info: tarfile.TarInfo) -> bytes:
        """Read a member's bytes; the caller has looked at its size. Raises tarfile.ReadError where it is cut."""
        if isinstance(self._source, _Local) and not info.issparse():
            self._source.seek(info.offset_data)
            data = self._source.read(info.size)
        else:
            data = self.tar.extractfile(info).read(info.size)  # type: ignore[union-attr]
        if len(data) != info.size:
            raise tarfile.ReadError(f"cut in the middle of {info.name}")
        return data

    def require_end(self) -> None:
        """Read to the end of the file: a hole of zeros reads like the end marker, but more comes behind it."""
        while rest := self.tar.fileobj.read(PIECE):  # type: ignore[union-attr]
            if rest.strip(b"\0"):
                raise tarfile.ReadError("its end marker comes too early")


@contextmanager
def open_members(file: ShardFile) -> Iterator[Members]:
    """Open a tar, plain or compressed by gzip, bzip2 or xz.

    In a plain local one a file that is not read is jumped over, and one that is comes in one piece; all others are read
    from beginning to end, as they come. Raises StorageError where the bytes cannot be had, and for damage what tarfile
    raises.
    """
    with file.open() as stream:
        raw = _Raw(stream, file)
        unpack = _packed(raw.head(6))
        if unpack is None and isinstance(file, LocalFile):
            stream.seek(0)
            local = _Local(stream)
            with tarfile.open(fileobj=local, mode="r:", tarinfo=StrictHeader) as tar:  # type: ignore[call-overload]
                yield Members(tar, local)
            return
        counted = _Counted(raw.read if unpack is None else unpack(raw), raw, compressed=unpack is not None)
        with tarfile.open(fileobj=counted, mode="r|", tarinfo=StrictHeader) as tar:  # type: ignore[call-overload]
            yield Members(tar, counted)


class _Raw(io.RawIOBase):
    """A file as it lies on a disk or behind a network, whose errors say nothing of what it holds."""

    def __init__(self, stream: IO[bytes], file: ShardFile) -> None:
        self._stream, self._file, self._head = stream, file, b""
        self.position = 0

    def head(self, size: int) -> bytes:
        """Return the first bytes, to be read again."""
        self._head = self.read(size)
        return self._head

    def read(self, size: int = -1) -> bytes:
        """Read at most so many bytes."""
        if self._head:
            data, self._head = self._head[:size], self._head[size:] if size >= 0 else b""
            return data
        try:
            data = self._stream.read(PIECE if size < 0 else size)
        except Exception as error:  # network libraries have errors of their own
            raise unreadable_shard(error, self._file) from error
        self.position += len(data)
        return data

    def readable(self) -> bool:
        """Say that it can be read."""
        return True


class _Local:
    """What tarfile reads of a plain local tar: a file that refuses to give more than a header may take."""

    compressed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.tell, self.seek = stream, stream.tell, stream.seek
        self.most: int | None = None
        """Position beyond which nothing belongs to the header that is being read; None: no header is."""

    def read(self, size: int = -1) -> bytes:
        """Read bytes. Raises tarfile.ReadError for a header that does not end."""
        data = self._stream.read(size)
        if self.most is not None and self.tell() > self.most:
            raise tarfile.ReadError(f"a header of more than {MOST_HEADER_BYTES:,} bytes")
        return data


class _Counted:
    """What tarfile reads: a stream that counts, and refuses to give more than a header may take."""

    def __init__(self, read: Callable[[int], bytes], raw: _Raw, *, compressed: bool) -> None:
        self._read, self._raw, self.compressed = read, raw, compressed
        self._position = self._empty = 0
        self.most: int | None = MOST_HEADER_BYTES
        """Position beyond which nothing belongs to the header that is being read; None: no header is."""

    def read(self, size: int) -> bytes:
        """Read bytes.

        Raises tarfile.ReadError for a header that does not end, a file that expands without end, and one that has
        ended: tarfile passes over a member of a terabyte that is not there in 100 million reads of nothing.
        """
        try:
            data = self._read(size)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # of unpacking: the disk's are StorageErrors
            raise tarfile.ReadError(f"its compressed data is cut or corrupt: {error}") from error
        self._position += len(data)
        self._empty += not data
        if self._empty > MOST_EMPTY:
            raise tarfile.ReadError("it ends before what its last header claims")
        # tarfile reads ahead by one record
        if self.most is not None and self._position > self.most + size + tarfile.RECORDSIZE:
            raise tarfile.ReadError(f"a header of more than {MOST_HEADER_BYTES:,} bytes")
        if self._position > FREE_EXPANSION + MOST_EXPANSION * self._raw.position:
            what = f"its {self._raw.position:,} bytes expand to {self._position:,} and more: no shard of photos does"
            raise tarfile.ReadError(what)
        return data


class _Xz:
    """A xz file; `lzma.LZMAFile` would give its dictionary any amount of memory."""

    def __init__(self, raw: _Raw) -> None:
        self._raw, self._engine = raw, lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes; empty at the end. Raises EOFError where it is cut."""
        while True:
            if self._engine.eof:
                rest = (self._engine.unused_data or self._raw.read(PIECE)).lstrip(b"\0")
                if not rest:
                    return b""
                self._engine = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            else:
                rest = self._raw.read(PIECE) if self._engine.needs_input else b""
                if not rest and self._engine.needs_input:
                    raise EOFError("the compressed file is cut")
            if data := self._engine.decompress(rest, size):
                return data


def _packed(head: bytes) -> Callable[[Any], Callable[[int], bytes]] | None:
    """Return what unpacks a file that begins so; None for one that is not compressed.

    It gives what there is by then: of a file that is cut, all that comes before.
    """
    if head.startswith(b"\x1f\x8b"):
        return lambda raw: gzip.GzipFile(fileobj=raw).read1
    if head.startswith(b"BZh"):
        return lambda raw: bz2.BZ2File(raw).read1
    return (lambda raw: _Xz(raw).read) if head.startswith((b"\xfd7zXZ", b"\x5d\x00\x00\x80")) else None
