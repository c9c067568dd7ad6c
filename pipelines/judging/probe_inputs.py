"""What a probe learns from and is judged on: photos or a cache's crops in any mix, under one numbering of classes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import fsspec

from tec_cache.cache import layout
from tec_cache.cache.layout import BLOCK_ROWS
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.data.files import LocalFile
from tec_cache.data.labels import LOOKED_FOR
from tec_cache.data.photos import Photo, Shard, plain_text
from tec_cache.data.readers import NOUNS, TAR, reader_of
from tec_cache.data.source import open_source
from tec_cache.errors import ConfigError, SourceError, listed, nearest
from tec_cache.printable import counted
from tec_cache.store import is_url, open_store

NO_LABEL = f"looked for {LOOKED_FOR} of a tar, for a column label of a parquet file, and for class folders"


@dataclass(frozen=True)
class Part:
    """One of a probe's two inputs."""

    source: str
    """As it was given."""
    classes: tuple[str, ...] | None
    """Names of the classes in the order of their numbers; None where labels are numbers only."""
    shards: Sequence[Shard] = ()
    """Of photos."""
    cache: Cache | None = None
    """Instead of photos: its crops of view 0 are the images."""

    def images(self) -> Iterator[tuple[Photo, str]]:
        """Yield each photo, or each stored crop as one, and where it is."""
        if self.cache is not None:
            yield from _crops(self.cache)
        for shard in self.shards:
            for photo in shard.photos():
                yield photo, shard.place

    def left_out_before(self) -> list[str]:
        """Return why photos are not in the cache, one reason for each."""
        cache = self.cache
        if cache is None:
            return []
        units = [unit for unit in cache.view_units if unit.view == 0]
        skipped = cache.of_units(units, lambda unit: cache.views_record(unit).skipped)
        return [reason for group in skipped for _, reason in group]


def open_part(source: str) -> Part:
    """Find out what an input is by what lies there, and open it.

    source: a cache or a pack of one (a folder or a URL), or photos as `extract` takes them. Raises SourceError where
    there is none of them.
    """
    if is_cache(source):
        cache = open_cache(source)
        cache.require_complete(1)
        names = cache.identity.get("classes")
        return Part(source, None if names is None else tuple(names), cache=cache)
    _require_there(source)
    photos = open_source(source).with_labels()
    return Part(source, photos.classes, photos.shards)


def is_cache(source: str) -> bool:
    """Say whether a folder or URL holds a cache or a pack; a pattern or a shard is not asked about."""
    if is_url(source) and _names_files(source):
        return False
    store = open_store(source)
    return any(store.size(name) is not None for name in (layout.MANIFEST, layout.PACK))


def _names_files(source: str) -> bool:
    return any(c in source for c in "{*?[") or reader_of(source.rpartition("/")[2]) is not None


def _require_there(source: str) -> None:
    """Raise SourceError for a local path with nothing at it; a missing shard is `open_source`'s to explain."""
    path = None if _names_files(source) else open_store(source).folder
    if path is not None and not os.path.lexists(path):
        near = nearest(path.name, LocalFile(str(path)).neighbours())
        todo = (
            "give a cache or a pack (the folder with its cache.json or pack.json), a folder of photos, "
            f"or {' or '.join(NOUNS)}"
        )
        raise SourceError(f"nothing lies here{near}", where=source, todo=todo)


def _crops(cache: Cache) -> Iterator[tuple[Photo, str]]:
    for unit in cache.view_units:
        if unit.view == 0:
            record = cache.views_record(unit)
            for start in range(0, len(record.keys), BLOCK_ROWS):
                rows = range(start, min(start + BLOCK_ROWS, len(record.keys)))
                for row, data in zip(rows, cache.read_crops(record, rows), strict=True):
                    yield Photo(record.keys[row], data, record.labels[row]), f"{cache.store.url}, unit {unit}"


@dataclass(frozen=True)
class Numbering:
    """How the labels of a part become the probe's classes."""

    numbers: tuple[int, ...] | None = None
    """Label -> class; None: they are the same."""
    most: int | None = None
    """Labels must be below, where they are numbers of names that only the other part has."""

    def of(self, photo: Photo, place: str) -> int:
        """Return the class of a photo that has a label. Raises ConfigError for a number that no name has."""
        assert photo.label is not None
        if photo.label < 0 or (self.most is not None and photo.label >= self.most):
            names = (
                f"the other part names {counted(self.most, 'class')}, from 0 on"
                if self.most
                else "classes count from 0 on"
            )
            todo = "give both parts in the same form: class folders, or tars with the same numbers"
            raise ConfigError(f"photo {photo.key!r} is of class {photo.label}; {names}", where=place, todo=todo)
        return photo.label if self.numbers is None else self.numbers[photo.label]


def number_classes(train: Part, test: Part) -> tuple[Numbering, Numbering, str]:
    """Return how the labels of both parts become classes, and what was assumed of them.

    Names are matched by name, whatever each part's own numbers are. Where one part has numbers only, they are taken
    for the other's: nothing in the files can show that they are, so it is said. Raises ConfigError where photos are
    to be judged whose class was never learned.
    """
    if train.classes is not None and test.classes is not None:
        unknown = [name for name in test.classes if name not in set(train.classes)]
        if unknown:
            unseen = [name for name in train.classes if name not in set(test.classes)]
            raise ConfigError(
                f"the classes differ, {listed(unknown)} are among the photos to judge on only"
                + (f", and {listed(unseen)} among those to learn from only" if unseen else ""),
                where=f"{train.source} and {test.source}",
                todo="judge on classes that were learned: their folders must have the same names",
            )
        place = {name: number for number, name in enumerate(train.classes)}
        return Numbering(), Numbering(tuple(place[name] for name in test.classes)), ""
    if train.classes is None and test.classes is None:
        return Numbering(), Numbering(), ""
    named, other = (train, test) if train.classes is not None else (test, train)
    names = named.classes or ()
    remark = f"the labels of {other.source} are numbers: taken for the classes of {named.source} in this order"
    limited = Numbering(most=len(names))
    return (Numbering(), limited, remark) if named is train else (limited, Numbering(), remark)


def no_label(photo: Photo, place: str) -> str:
    """Say that a photo has no label, what its sample consists of, and where a label is looked for."""
    fields = _fields(place, photo.key)
    beside = f"; its sample has {', '.join(fields)}" if fields else ""
    return f"no label{beside} ({photo.note or NO_LABEL})"


def _fields(tar: str, key: str) -> list[str]:
    """Return what follows the key in the names of a sample's members, as far as the tar can be read."""
    fields: list[str] = []
    if not TAR.takes(tar.rpartition("/")[2]):
        return fields
    with suppress(OSError, tarfile.TarError), fsspec.open(tar, "rb") as stream:
        with tarfile.open(fileobj=stream, mode="r|*") as members:
            for member in members:
                if plain_text(member.name).startswith(f"{key}."):
                    fields.append(plain_text(member.name).removeprefix(f"{key}."))
                elif fields:
                    break
    return fields
