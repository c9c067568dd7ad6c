"""Hard links in a tar: a member that is another name of an earlier one, and has no bytes of its own."""

from __future__ import annotations

import tarfile

import fsspec

from tec_cache.data.photos import plain_text
from tec_cache.data.samples import Member


class Links:
    """Remembers where the files of a tar are, and reads them again for the links to them.

    In a plain tar a link costs one read of its file's bytes, local or not; in a compressed one, where nobody can jump,
    it costs unpacking all that comes before the file. Nothing is kept in memory but names and positions.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._files: dict[str, tarfile.TarInfo] = {}

    def note(self, info: tarfile.TarInfo) -> None:
        """Remember a file; of two with one name the later one counts, as it does when they are unpacked."""
        self._files[info.name] = info

    def read(self, link: tarfile.TarInfo, *, compressed: bool) -> Member:
        """Return a link as a member with the bytes of its file; with a problem where that did not come before it."""
        name = plain_text(link.name)
        file = self._files.get(link.linkname)
        if file is None:
            target = plain_text(link.linkname)
            return Member(name, b"", f"it is a hard link to {target!r}, which is not among the files before it")
        self._files[link.name] = file
        if not compressed:
            fs, path = fsspec.core.url_to_fs(self._url)
            data = fs.cat_file(path, start=file.offset_data, end=file.offset_data + file.size)
            if len(data) != file.size:
                raise tarfile.ReadError(f"cut in the middle of {file.name}")
            return Member(name, data)
        with fsspec.open(self._url, "rb") as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            for info in tar:
                if info.offset_data == file.offset_data:
                    return Member(name, tar.extractfile(info).read())  # type: ignore[union-attr]
        raise tarfile.ReadError(f"{file.name} is gone")
