"""A tar of photos, read one member at a time.

A damaged shard never ends quietly: a corrupt header, a cut file and a missing end marker are all told from
a proper end, because neither tarfile nor webdataset does so by itself.
"""

from __future__ import annotations

import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileOpener
from webdataset.tariterators import base_plus_ext

from tec_cache.data.apart import SHARD_SUFFIXES, refuse_apart
from tec_cache.data.labels import Label, Labels
from tec_cache.data.links import Links
from tec_cache.data.passed_over import (
    HIDDEN,
    METADATA,
    NO_SUFFIX,
    SIDE_IMAGES,
    SPECIAL,
    SYMBOLIC_LINKS,
    PassedOver,
    is_hidden_path,
    kind_of,
    passed_over_text,
)
from tec_cache.data.photos import Photo, Shard, plain_text
from tec_cache.data.samples import Member, Sample, samples
from tec_cache.errors import SourceError, StorageError, TecCacheError


@dataclass(frozen=True)
class TarShard(Shard):
    """A tar (or tar.gz) of photos in WebDataset's layout."""

    url: str
    labels: Labels = field(default_factory=Labels)

    @property
    def place(self) -> str:
        """The URL."""
        return self.url

    def with_classes(self, classes: tuple[str, ...]) -> TarShard:
        """Return the same shard with labels that are names of these classes."""
        return replace(self, labels=replace(self.labels, classes=classes))

    def photos(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the photos in order.

        The sample just before a damage is left out: nobody can say whether its label, for one, is lost. A photo
        without a label, and a label without a photo, may have the other somewhere else in the shard: before the first
        such sample is given, the names of all members are looked through. In a plain local tar, whose photos are jumped
        over, that costs 0.1 s of a core for 1,000 photos; a compressed or remote shard is read twice.
        """
        counts = PassedOver() if passed_over is None else passed_over
        given, looked = 0, False
        for sample in samples(members(self.url, counts), self.url):
            photo = self._photo(sample, counts)
            lacks = photo is not None and (photo.label is None or sample.image is None)
            if not looked and (lacks or _holds_a_tar(sample)):
                names = samples(members(self.url, PassedOver(), lambda name: False), self.url)
                refuse_apart(names, {"cls", self.labels.field or "cls"}, self.url)
                looked = True
            if photo is not None:
                given += 1
                yield photo
        if not given:
            passed = f"; in it: {passed_over_text(counts)}" if counts else ""
            raise SourceError(f"the shard holds no photos{passed}", where=self.url, todo="leave it out")

    def label_values(self) -> Iterator[tuple[Label, dict[str, bytes]]]:
        """Yield the label of each photo as it is written, and its other fields; bytes are read of a few only."""
        for sample in samples(members(self.url, PassedOver(), self.labels.wanted), self.url):
            if sample.image is not None:
                fields = {name: m.data for name, m in sample.fields.items() if not m.is_image}
                yield self.labels.read(fields), fields

    def _photo(self, sample: Sample, counts: PassedOver) -> Photo | None:
        """Make a photo of a sample; None where it is none, and then its members are counted."""
        fields = {name: member.data for name, member in sample.fields.items() if not member.problem}
        label = self.labels.read(fields)
        for member in sample.beside:
            counts.add(SIDE_IMAGES if member.is_image else kind_of(member.name))
        problem = sample.problem
        if sample.image is None and not problem:
            if label.value is None and "cls" not in sample.fields:
                for member in sample.fields.values():
                    counts.add_file(member.name)
                return None
            problem = f"no image among its fields ({', '.join(sorted(sample.fields))})"
        number, note = self.labels.number(label)
        if number is None and not note:
            note = next((m.problem for m in sample.fields.values() if m is not sample.image), "")
        data = b"" if problem or sample.image is None else sample.image.data
        return Photo(sample.key, data, number, problem, note)


def _holds_a_tar(sample: Sample) -> bool:
    return sample.image is None and any(m.name.lower().endswith(SHARD_SUFFIXES) for m in sample.fields.values())


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


def members(url: str, passed_over: PassedOver, wanted: Callable[[str], bool] | None = None) -> Iterator[Member]:
    """Yield the files of a tar that may belong to a sample, count the others, or raise SourceError.

    wanted: says by the name whose bytes are wanted; those of the other members are not read.
    """
    broken = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
    todo = "make the shard again, or --on-error skip to use what comes before the damage"
    links = Links(url)
    try:
        with fsspec.open(url, "rb") as stream:
            with tarfile.open(fileobj=stream, mode=_mode(stream, wanted), tarinfo=_StrictHeader) as tar:
                for info in tar:
                    if info.isfile():
                        links.note(info)
                    if kind := _no_member(info):
                        passed_over.add(kind)
                    elif info.isdir():
                        continue
                    elif wanted is not None and not wanted(info.name):
                        yield Member(plain_text(info.name), b"")
                    elif info.islnk():
                        yield links.read(info, compressed=_compressed(tar))
                    else:
                        data = tar.extractfile(info).read()  # type: ignore[union-attr]
                        if len(data) != info.size:
                            raise tarfile.ReadError(f"cut in the middle of {info.name}")
                        yield Member(plain_text(info.name), data)
                # a hole of zeros reads like the end of the archive; behind the true end there are only zeros
                while rest := tar.fileobj.read(1 << 20):  # type: ignore[union-attr]
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError("its end marker comes too early")
    except broken as error:
        raise SourceError(f"damaged shard: {error}", where=url, todo=todo) from error
    except TecCacheError:
        raise
    except Exception as error:
        # a disk or a network that fails says nothing of the shard: it must not be recorded as its damage
        todo = "check the disk or the network; what is finished is kept, the same command goes on"
        raise StorageError(
            f"the shard cannot be read: {type(error).__name__}: {error}", where=url, todo=todo
        ) from error


_METADATA_NAME = re.compile(r"__[^/]*__($|/)")


def _no_member(info: tarfile.TarInfo) -> str:
    """Return the kind under which something that is no member of a sample is counted; empty for all else."""
    if info.isdir():
        return ""
    if is_hidden_path(info.name):
        return HIDDEN
    if not (info.isfile() or info.islnk()):
        return SYMBOLIC_LINKS if info.issym() else SPECIAL
    if _METADATA_NAME.match(info.name):
        return METADATA
    return "" if base_plus_ext(info.name)[0] else NO_SUFFIX


def _mode(stream: Any, wanted: Callable[[str], bool] | None) -> Any:
    """Jump from header to header where that is cheap and not all is wanted: in a plain local tar."""
    if wanted is None or not isinstance(stream, LocalFileOpener):
        return "r|*"
    start = stream.read(len(_MAGIC[-1]))
    stream.seek(0)
    return "r|*" if start.startswith(_MAGIC) else "r:"


_MAGIC = (b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd", b"\x5d\x00\x00\x80", b"\xfd7zXZ")
"""How compressed files begin."""


def _compressed(tar: tarfile.TarFile) -> bool:
    """Say whether what is read is packed, so that positions in the tar are none in the file."""
    return getattr(tar.fileobj, "comptype", "tar") != "tar"
