"""A tar of photos, read one member at a time.

A damaged shard never ends quietly: a corrupt header, a cut file and a missing end marker are all told from
a proper end, because neither tarfile nor webdataset does so by itself.
"""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from webdataset.tariterators import base_plus_ext

from tec_cache.data.contents import Contents, file_contents
from tec_cache.data.files import ShardFile
from tec_cache.data.photos import Photo, Shard, plain_text
from tec_cache.data.samples import samples
from tec_cache.errors import SourceError, StorageError, TecCacheError

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class TarShard(Shard):
    """A tar (or tar.gz) of photos in WebDataset's layout."""

    file: ShardFile

    @property
    def place(self) -> str:
        """Path or URL, without credentials."""
        return self.file.where

    @cached_property
    def contents(self) -> Contents:
        """Size and ends of the file."""
        return file_contents(self.file)

    def photos(self) -> Iterator[Photo]:
        """Yield the photos in order.

        The sample just before a damage is left out: nobody can say whether its label, for one, is lost.
        """
        group: list[tuple[str, bytes]] = []
        current: str | None = None
        seen: set[str] = set()
        for name, data in members(self.file):
            stem, _ = base_plus_ext(name)
            if stem != current and group:
                yield from samples(group, seen)
                group = []
            current = stem
            group.append((name, data))
        if not group:
            raise SourceError("the shard holds no photos", where=self.place, todo="leave it out")
        yield from samples(group, seen)


class _StrictHeader(tarfile.TarInfo):
    """Turns what tarfile treats as a quiet end (a bad header, no end marker) into an error."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictHeader:
        try:
            return super().fromtarfile(tar)  # type: ignore[return-value]
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # two blocks of zeros: the proper end
        except tarfile.HeaderError as error:
            kind = (
                "cut in the middle" if "Empty" in type(error).__name__ or "Trunc" in type(error).__name__ else "corrupt"
            )
            raise tarfile.ReadError(f"{kind} at byte {tar.offset}: {error}") from error  # type: ignore[attr-defined]


def members(file: ShardFile) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the regular files of a tar, or raise SourceError."""
    broken = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
    todo = "make the shard again, or --on-error skip to use what comes before the damage"
    try:
        with file.open() as stream:
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
                for info in tar:
                    if not info.isfile():
                        continue
                    data = tar.extractfile(info).read()  # type: ignore[union-attr]
                    if len(data) != info.size:
                        raise tarfile.ReadError(f"cut in the middle of {info.name}")
                    yield plain_text(info.name), data
                # a hole of zeros reads like the end of the archive; behind the true end there are only zeros
                while rest := tar.fileobj.read(1 << 20):  # type: ignore[union-attr]
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError("its end marker comes too early")
    except broken as error:
        raise SourceError(f"damaged shard: {error}", where=file.where, todo=todo) from error
    except TecCacheError:
        raise
    except Exception as error:
        # a disk or a network that fails says nothing of the shard: it must not be recorded as its damage
        todo = "check the disk or the network; what is finished is kept, the same command goes on"
        raise StorageError(f"the shard cannot be read: {file.explained(error)}", where=file.where, todo=todo) from error
