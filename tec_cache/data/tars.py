"""A tar of photos, read one member at a time.

A damaged shard never ends quietly: a corrupt header, a cut file and a missing end marker are all told from
a proper end, because neither tarfile nor webdataset does so by itself.
"""

from __future__ import annotations

import pickle
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tec_cache.data.apart import TAR_SUFFIXES, refuse_apart
from tec_cache.data.file_shards import FileShard
from tec_cache.data.files import ShardFile, unreadable_shard
from tec_cache.data.labels import LOOKED_FOR, Label, Labels
from tec_cache.data.links import Links
from tec_cache.data.passed_over import (
    HIDDEN,
    LONELY_MASKS,
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
from tec_cache.data.photos import MASK_SUFFIX, MOST_PHOTO_BYTES, Extent, Home, OneByOneError, Photo, plain_text
from tec_cache.data.samples import Member, Sample, samples, split_name
from tec_cache.data.tar_stream import open_members
from tec_cache.errors import SourceError, TecCacheError

MOST_SAMPLE_BYTES = 2 * MOST_PHOTO_BYTES
"""Of all files with one key, which are held together: a photo and as much beside it."""


@dataclass(frozen=True)
class TarShard(FileShard):
    """A tar (or tar.gz) of photos in WebDataset's layout."""

    masked: bool = False
    """Whether KEY.seg.png is a photo's mask, and not something that is passed over."""

    def with_masks(self, beside: frozenset[str]) -> TarShard:
        """Return the same shard with the masks of its photos."""
        return replace(self, masked=True)

    def photos(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the photos in order.

        The sample just before a damage is left out: nobody can say whether its label, for one, is lost. A photo
        without a label, and a label without a photo, may have the other somewhere else in the shard: before the first
        such sample is given, the names of all members are looked through. In a plain local tar, whose photos are jumped
        over, that costs 0.1 s of a core for 1,000 photos; a compressed or remote shard is read twice.
        """
        counts = PassedOver() if passed_over is None else passed_over
        return self._given(members(self.file, counts), counts)

    def places(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the photos in order, without reading them where the tar is local.

        Raises OneByOneError for a compressed tar, in which nobody can jump.
        """
        counts = PassedOver() if passed_over is None else passed_over
        return self._given(members(self.file, counts, self.labels.wanted, plain=True), counts)

    def _given(self, every: Iterator[Member], counts: PassedOver) -> Iterator[Photo]:
        given, looked = 0, False
        for sample in samples(every, self.place):
            photo = self._photo(sample, counts)
            lacks = photo is not None and ((photo.label is None and not self.masked) or sample.image is None)
            if not looked and (lacks or _holds_a_tar(sample)):
                names = samples(members(self.file, PassedOver(), lambda name: False), self.place)
                refuse_apart(names, {"cls", self.labels.field or "cls"}, self.place)
                looked = True
            if photo is not None:
                given += 1
                yield photo
        if not given:
            passed = f"; in it: {passed_over_text(counts)}" if counts else ""
            raise SourceError(f"the shard holds no photos{passed}", where=self.place, todo="leave it out")

    def home(self) -> Home:
        """Return what reads single photos of a plain tar."""
        return TarHome(self.place, self.file)

    def label_values(self, labels: Labels) -> Iterator[tuple[Label, dict[str, bytes]]]:
        """Yield the label of each photo as it is written, and its other fields; bytes are read of a few only."""
        for sample in samples(members(self.file, PassedOver(), labels.wanted), self.place):
            if sample.image is not None:
                fields = {name: m.data for name, m in sample.fields.items() if not m.is_image}
                yield labels.read(fields), fields

    def looked_for(self, labels: Labels) -> str:
        """Name the members of a sample."""
        return f"KEY.{labels.field}" if labels.field else LOOKED_FOR

    def _photo(self, sample: Sample, counts: PassedOver) -> Photo | None:
        """Make a photo of a sample; None where it is none, and then its members are counted."""
        fields = {name: member.data for name, member in sample.fields.items() if not member.problem}
        label = self.labels.read(fields)
        if self.masked and sample.image is not None and _is_mask(sample.image):
            counts.add(LONELY_MASKS)
            return None
        mask = next((m for m in sample.beside if self.masked and _is_mask(m)), None)
        for member in sample.beside:
            if member is not mask:
                counts.add(SIDE_IMAGES if member.is_image else kind_of(member.name))
        problem = sample.problem or (mask.problem if mask else "")
        if sample.image is None and not problem:
            if label.value is None and "cls" not in sample.fields:
                for member in sample.fields.values():
                    counts.add_file(member.name)
                return None
            problem = f"no image among its fields ({', '.join(sorted(sample.fields))})"
        number, note = self.labels.number(label)
        if number is None and not note:
            note = next((m.problem for m in sample.fields.values() if m is not sample.image), "")
        if problem or sample.image is None:
            return Photo(sample.key, b"", number, problem, note)
        image = sample.image
        where, data = (mask.extent, mask.data) if mask else (None, b"")
        return Photo(sample.key, image.data, number, "", note, image.extent, where, data)


@dataclass(frozen=True)
class TarHome(Home):
    """A plain tar."""

    place: str
    file: ShardFile

    def read(self, name: str, extent: Extent) -> bytes:
        """Read a photo by one `pread`, or one request."""
        try:
            data = self.file.part(extent.offset, extent.offset + extent.size)
        except TecCacheError:
            raise
        except Exception as error:  # network libraries have errors of their own
            raise unreadable_shard(error, self.file) from error
        if len(data) != extent.size:
            raise SourceError(f"{len(data):,} of its {extent.size:,} bytes are left: the shard has changed")
        return data

    def reopened(self) -> TarHome:
        """Return the same with a file system of its own."""
        return replace(self, file=pickle.loads(pickle.dumps(self.file)))


def _is_mask(member: Member) -> bool:
    return "." + member.field == MASK_SUFFIX


def _holds_a_tar(sample: Sample) -> bool:
    return sample.image is None and any(m.name.lower().endswith(TAR_SUFFIXES) for m in sample.fields.values())


DAMAGE = (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError)
"""What tarfile raises for headers that make no sense."""


def members(
    file: ShardFile, passed_over: PassedOver, wanted: Callable[[str], bool] | None = None, *, plain: bool = False
) -> Iterator[Member]:
    """Yield the files of a tar that may belong to a sample, count the others, or raise SourceError.

    wanted: says by the name whose bytes are wanted; those of the other members are not read. plain: raise
    OneByOneError for a compressed tar.
    """
    todo = "make the shard again, or --on-error skip to use what comes before the damage"
    try:
        with open_members(file) as tar:
            if plain and tar.compressed:
                raise _packed(file.where)
            links, held = Links(file, compressed=tar.compressed), Held()
            for info in tar:
                if info.isfile():
                    links.note(info)
                if kind := _no_member(info):
                    passed_over.add(kind)
                elif info.isdir():
                    continue
                elif problem := held.refused(info.name, links.size(info)):
                    yield Member(plain_text(info.name), b"", problem)
                elif wanted is not None and not wanted(info.name):
                    yield links.place(info)
                elif info.islnk():
                    yield links.read(info)
                else:
                    yield Member(plain_text(info.name), tar.read(info))
            tar.require_end()
    except TecCacheError:
        raise
    except DAMAGE as error:
        text = str(error) if isinstance(error, tarfile.TarError) else f"{type(error).__name__}: {error}"
        raise SourceError(f"damaged shard: {text}", where=file.where, todo=todo) from error
    except Exception as error:
        raise unreadable_shard(error, file) from error


def _packed(where: str) -> OneByOneError:
    return OneByOneError(
        "the shard is compressed, and photos are read from it in a random order",
        where=where,
        todo="unpack it: gunzip (or bunzip2, unxz) leaves a .tar; photos are hardly larger for it",
    )


class Held:
    """How many bytes of members with one key are in memory together."""

    def __init__(self) -> None:
        self._stem, self._bytes = "", 0

    def refused(self, name: str, size: int) -> str:
        """Say why a member is too large to be read; empty where it is not."""
        stem = split_name(name)[0] or name
        if stem != self._stem:
            self._stem, self._bytes = stem, 0
        if size > MOST_PHOTO_BYTES:
            return f"{size:,} bytes are more than any photo has (at most {MOST_PHOTO_BYTES:,})"
        self._bytes += size
        if self._bytes > MOST_SAMPLE_BYTES:
            return f"the files of its sample have more than {MOST_SAMPLE_BYTES:,} bytes"
        return ""


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
    return "" if split_name(info.name)[0] else NO_SUFFIX
