"""Hard links in a tar: a member that is another name of an earlier one, and has no bytes of its own."""

from __future__ import annotations

import tarfile
from typing import NamedTuple

from tec_cache.data.files import ShardFile
from tec_cache.data.photos import plain_text
from tec_cache.data.samples import Member
from tec_cache.data.tar_stream import open_members

MOST_AGAIN = 64 << 30
"""Bytes of a shard that are read, or unpacked, once more for its links: some minutes."""


class _Place(NamedTuple):
    offset: int
    size: int


class Links:
    """Remembers where the files of a tar are, and reads them again for the links to them.

    In a plain tar a link costs one read of its file's bytes, local or not; in a compressed one, where nobody can jump,
    it costs unpacking all that comes before the file. Nothing is kept in memory but names and positions.
    """

    def __init__(self, file: ShardFile, *, compressed: bool) -> None:
        self._file, self._compressed = file, compressed
        self._files: dict[str, _Place] = {}
        self._again = 0

    def note(self, info: tarfile.TarInfo) -> None:
        """Remember a file; of two with one name the later one counts, as it does when they are unpacked."""
        self._files[info.name] = _Place(info.offset_data, info.size)

    def size(self, info: tarfile.TarInfo) -> int:
        """Return the bytes that a member gives: its own, or those of the file to which it links."""
        place = self._files.get(info.linkname) if info.islnk() else None
        return place.size if place is not None else info.size

    def read(self, link: tarfile.TarInfo) -> Member:
        """Return a link as a member with the bytes of its file; with a problem where these cannot be had."""
        name = plain_text(link.name)
        file = self._files.get(link.linkname)
        if file is None:
            target = plain_text(link.linkname)
            return Member(name, b"", f"it is a hard link to {target!r}, which is not among the files before it")
        self._files[link.name] = file
        self._again += file.size + (file.offset if self._compressed else 0)
        if self._again > MOST_AGAIN:
            return Member(name, b"", "it is a hard link, of which there are too many: pack the files themselves")
        if self._compressed:
            return Member(name, self._unpacked(file))
        data = self._file.part(file.offset, file.offset + file.size)
        if len(data) != file.size:
            raise tarfile.ReadError(f"cut in the middle of a file to which {name} links")
        return Member(name, data)

    def _unpacked(self, file: _Place) -> bytes:
        with open_members(self._file) as tar:
            for info in tar:
                if info.offset_data == file.offset:
                    return tar.read(info)
        raise tarfile.ReadError("a file to which others link is gone")
