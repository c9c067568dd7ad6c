"""Hard links in a tar: a member that is another name of an earlier one, and has no bytes of its own."""

from __future__ import annotations

import tarfile

from tec_cache.data.files import ShardFile
from tec_cache.data.photos import Extent, plain_text
from tec_cache.data.samples import Member
from tec_cache.data.tar_stream import open_members

MOST_AGAIN = 64 << 30
"""Bytes of a shard that are read, or unpacked, once more for its links: some minutes."""


class Links:
    """Remembers where the files of a tar are, and reads them again for the links to them.

    In a plain tar a link costs one read of its file's bytes, local or not; in a compressed one, where nobody can jump,
    it costs unpacking all that comes before the file. Nothing is kept in memory but names and positions.
    """

    def __init__(self, file: ShardFile, *, compressed: bool) -> None:
        self._file, self._compressed = file, compressed
        self._files: dict[str, Extent] = {}
        self._again = 0

    def note(self, info: tarfile.TarInfo) -> None:
        """Remember a file; of two with one name the later one counts, as it does when they are unpacked.

        Of a sparse file what lies in the tar is not what it holds: none can link to it.
        """
        if info.issparse():
            self._files.pop(info.name, None)
        else:
            self._files[info.name] = Extent(info.offset_data, info.size)

    def size(self, info: tarfile.TarInfo) -> int:
        """Return the bytes that a member gives: its own, or those of the file to which it links."""
        place = self._files.get(info.linkname) if info.islnk() else None
        return place.size if place is not None else info.size

    def place(self, info: tarfile.TarInfo) -> Member:
        """Return a file or a link as a member without its bytes, which says where they are, or why they are nowhere."""
        name = plain_text(info.name)
        if info.issparse():
            return Member(name, b"", "it is stored as a sparse file, whose bytes do not lie side by side")
        file = Extent(info.offset_data, info.size) if info.isfile() else self._file_of(info)
        if file is None:
            return Member(name, b"", _nowhere(info))
        return Member(name, b"", extent=None if self._compressed else file)

    def _file_of(self, link: tarfile.TarInfo) -> Extent | None:
        """Look up the file of a link, and remember the link as another name of it."""
        file = self._files.get(link.linkname)
        if file is not None:
            self._files[link.name] = file
        return file

    def read(self, link: tarfile.TarInfo) -> Member:
        """Return a link as a member with the bytes of its file; with a problem where these cannot be had."""
        name = plain_text(link.name)
        file = self._file_of(link)
        if file is None:
            return Member(name, b"", _nowhere(link))
        self._again += file.size + (file.offset if self._compressed else 0)
        if self._again > MOST_AGAIN:
            return Member(name, b"", "it is a hard link, of which there are too many: pack the files themselves")
        if self._compressed:
            return Member(name, self._unpacked(file))
        data = self._file.part(file.offset, file.offset + file.size)
        if len(data) != file.size:
            raise tarfile.ReadError(f"cut in the middle of a file to which {name} links")
        return Member(name, data)

    def _unpacked(self, file: Extent) -> bytes:
        with open_members(self._file) as tar:
            for info in tar:
                if info.offset_data == file.offset:
                    return tar.read(info)
        raise tarfile.ReadError("a file to which others link is gone")


def _nowhere(link: tarfile.TarInfo) -> str:
    return f"it is a hard link to {plain_text(link.linkname)!r}, which is not among the files before it"
