"""Where each annotated photo lies, so that any of them can be read by itself, in any order."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch

from tec_cache.background import in_order
from tec_cache.data.images import decode_photo
from tec_cache.data.passed_over import PassedOver
from tec_cache.data.photos import Extent, Home, OneByOneError, Photo, Shard, plain_text
from tec_cache.data.source import Source
from tec_cache.errors import ConfigError, SourceError
from tec_cache.labelled.left_out import LeftOut
from tec_cache.labelled.names import Names
from tec_cache.labelled.transforms import Transform
from tec_cache.printable import are, counted
from tec_cache.progress import Progress
from tec_cache.rng import key64, uniform

READERS = 8
"""Shards that are looked through at the same time: to read headers is to wait, of remote shards at least."""


@dataclass(frozen=True)
class Held(Home):
    """The bytes of a shard's photos one after another, of a shard in which they cannot be read one at a time."""

    place: str
    data: bytes

    def read(self, name: str, extent: Extent) -> bytes:
        """Read a photo."""
        return self.data[extent.offset : extent.offset + extent.size]


@dataclass(frozen=True)
class PhotoIndex(ABC):
    """The annotated photos of a source, in its order, and what of it is none.

    shard: (N,) int32. offset, size: (N,) int64, in bytes (of a file of a folder, or a row of a table, its number, and
    -1).
    sample_keys: (N,) uint64, a function of (shard, key), as in a cache's batches.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("shard", "offset", "size", "sample_keys")
    """Arrays of a row for each photo."""
    ANNOTATION: ClassVar[str]
    """What each photo has, for messages."""

    homes: tuple[Home, ...]
    """Of each shard."""
    names: Names
    """Keys, of photos in a folder the paths below it."""
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    sample_keys: npt.NDArray[np.uint64]
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers; None where they are numbers."""
    unlabelled: LeftOut = field(default_factory=LeftOut)
    """Photos without an annotation that is understood: nothing can be learned from them."""
    unusable: LeftOut = field(default_factory=LeftOut)
    """Photos whose bytes cannot be had, and ends of damaged shards, where these are skipped."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Kind -> how many things are no photos."""

    @abstractmethod
    def example(self, number: int, transform: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a photo as a transform makes it, and what is to be learned of it.

        Raises SourceError where either is not whole, StorageError where nobody can tell, ConfigError for an annotation
        that cannot be meant.
        """

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def keys(self) -> list[str]:
        """Keys of all photos."""
        return [plain_text(name) for name in self.names]

    def key(self, number: int) -> str:
        """Return the key of a photo."""
        return plain_text(self.names[number])

    def place(self, number: int) -> str:
        """Return the shard of a photo, for messages."""
        return self.homes[self.shard[number]].place

    def read(self, number: int) -> bytes:
        """Return the bytes of a photo. Raises SourceError where they are gone, StorageError where nobody can tell."""
        extent = Extent(int(self.offset[number]), int(self.size[number]))
        return self.homes[self.shard[number]].read(self.names[number], extent)

    def divided(self, share: float, *, seed: int) -> tuple[Self, Self]:
        """Hold a share of the photos out: (the rest, those held out), a function of (seed, the photos).

        Raises ConfigError where either would be empty.
        """
        order = np.argsort(uniform(self.sample_keys ^ np.uint64(key64("held out", seed)), 1)[:, 0], kind="stable")
        count = round(share * len(self))
        if not 0 < count < len(self):
            todo = "give a share that holds at least one photo, and leaves one"
            raise ConfigError(
                f"{share:g} of {counted(len(self), 'photo')} {are(count)} {count}", where=self.homes[0].place, todo=todo
            )
        return self._chosen(np.sort(order[count:])), self._chosen(np.sort(order[:count]))

    def _chosen(self, numbers: npt.NDArray[np.int64]) -> Self:
        columns = {name: getattr(self, name)[numbers] for name in self.COLUMNS}
        return replace(self, names=Names.of(self.names[int(i)] for i in numbers), **columns)

    @abstractmethod
    def fingerprint(self) -> str:
        """Return what tells these photos and annotations from others, as hex."""

    def reopened(self) -> Self:
        """Return the same with file systems of its own: connections do not survive a fork."""
        return replace(self, homes=tuple(home.reopened() for home in self.homes))


@dataclass(frozen=True)
class LabelledIndex(PhotoIndex):
    """Photos, each of a class. label: (N,) int64, from zero on."""

    COLUMNS: ClassVar[tuple[str, ...]] = (*PhotoIndex.COLUMNS, "label")
    ANNOTATION: ClassVar[str] = "label"

    label: npt.NDArray[np.int64] = field(kw_only=True)

    @property
    def num_classes(self) -> int:
        """Number of the classes: of their names, or one more than the highest label."""
        return int(self.label.max()) + 1 if self.classes is None else len(self.classes)

    def example(self, number: int, transform: Transform) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pixels that a transform makes of a photo, and its class, () int64."""
        return transform(decode_photo(self.read(number)).image), torch.tensor(int(self.label[number]))

    def fingerprint(self) -> str:
        """Return what tells these photos and labels from others, as hex: keys, sizes, labels, names of classes."""
        return column_hash(self.classes, self.sample_keys, self.size, self.label)


def column_hash(classes: tuple[str, ...] | None, *columns: npt.NDArray[Any]) -> str:
    """Return the hash of some columns and of the names of the classes, as hex."""
    digest = hashlib.sha256(repr(classes).encode())
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def index_photos(source: Source, *, quiet: bool = True, on_error: str = "stop") -> LabelledIndex:
    """Look through all shards for their photos and labels; of local tars only headers and labels are read.

    source: with its labels found (`Source.with_labels`). on_error, quiet, errors: of `look_through`; also ConfigError
    for a label below zero.
    """

    def label_of(photo: Photo, shard: Shard) -> tuple[int, ...] | str:
        if photo.label is None:
            return photo.note or "no label"
        _require_class(photo, shard)
        return (photo.label,)

    todo = (
        "a tar's label is in KEY.cls, a parquet file's in its column label, or where --label-field says; "
        "a folder's photos lie in class folders"
    )
    found, (label,) = look_through(source, label_of, LabelledIndex.ANNOTATION, 1, todo, quiet=quiet, on_error=on_error)
    return LabelledIndex(**found, label=label)


MOST_UNPACKED = 2 << 30
"""Bytes of photos that cannot be read one at a time, which are held in memory, by each process of a job."""

Annotate = Callable[[Photo, Shard], tuple[int, ...] | str]
"""Returns the numbers that an index keeps of a photo's annotation, or why it has none."""


def look_through(
    source: Source, annotate: Annotate, annotation: str, width: int, todo: str, *, quiet: bool, on_error: str
) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Look through all shards; return the fields of a `PhotoIndex`, and `annotate`'s numbers, (width, N) int64.

    annotation, todo: what is looked for, and where it should be, for messages. on_error: what a photo whose bytes
    cannot be had and a damaged shard do: "stop" (SourceError), or "skip" (named in `unusable`). quiet: no progress.

    Photos that cannot be read one at a time, those of compressed tars for one, are taken into memory. Raises
    ConfigError where they are more than MOST_UNPACKED bytes, SourceError where no photo has an annotation, and what the
    photos of a shard raise.
    """
    parts: list[_Part] = []
    unpacked = Unpacked()

    def look(numbered: tuple[int, Shard]) -> _Part:
        return _Part.of(*numbered, annotate, width, unpacked, skip=on_error == "skip")

    with (
        Progress("where the photos lie", noun="shard", total=len(source.shards), quiet=quiet) as progress,
        ThreadPoolExecutor(READERS, thread_name_prefix="index") as pool,
    ):
        for part in in_order(pool, look, enumerate(source.shards), READERS):
            parts.append(part)
            progress.advance(1)
    unlabelled, unusable, passed_over = LeftOut(), LeftOut(), PassedOver(source.passed_over)
    for part in parts:
        unlabelled.join(part.unlabelled)
        unusable.join(part.unusable)
        passed_over.update(part.passed_over)
    columns = np.concatenate([part.columns for part in parts], axis=1)
    if not columns.shape[1]:
        why = f"; without one are {unlabelled}" if unlabelled else f"; unusable are {unusable}" if unusable else ""
        raise SourceError(f"no photo has a {annotation}{why}", where=source.shards[0].place, todo=todo)
    shard, offset, size, *rest = columns
    fields: dict[str, Any] = {
        "homes": tuple(
            shard.home() if part.held is None else Held(shard.place, part.held)
            for shard, part in zip(source.shards, parts, strict=True)
        ),
        "names": Names.joined([part.names for part in parts]),
        "shard": shard.astype(np.int32),
        "offset": offset,
        "size": size,
        "sample_keys": np.concatenate([part.sample_keys for part in parts]),
        "classes": source.classes,
        "unlabelled": unlabelled,
        "unusable": unusable,
        "passed_over": passed_over.told(),
    }
    return fields, np.stack(rest)


@dataclass
class _Part:
    """What a shard holds. columns: shard, offset, size and the annotation's, (3 + width, N) int64."""

    names: Names
    columns: npt.NDArray[np.int64]
    sample_keys: npt.NDArray[np.uint64]
    passed_over: PassedOver
    unlabelled: LeftOut
    unusable: LeftOut
    held: bytes | None
    """Photos and masks of a shard in which they cannot be read one at a time."""

    @classmethod
    def of(cls, number: int, shard: Shard, annotate: Annotate, width: int, unpacked: Unpacked, *, skip: bool) -> _Part:
        """Look through a shard."""
        try:
            return cls._of(number, shard, shard.places, annotate, width, None, skip=skip)
        except OneByOneError as error:
            held = bytearray()
            places = unpacked.into(held, shard, error)
            return cls._of(number, shard, places, annotate, width, held, skip=skip)

    @classmethod
    def _of(
        cls,
        number: int,
        shard: Shard,
        places: Callable[[PassedOver], Iterator[Photo]],
        annotate: Annotate,
        width: int,
        held: bytearray | None,
        *,
        skip: bool,
    ) -> _Part:
        passed_over, unlabelled, unusable = PassedOver(), LeftOut(), LeftOut()
        names: list[str] = []
        keys: list[int] = []
        rows: list[tuple[int, ...]] = []
        try:
            for photo in places(passed_over):
                if photo.problem or photo.extent is None:
                    if not skip:
                        raise broken_photo(photo.key, photo.problem, shard.place)
                    unusable.add(f"{shard.place}: photo {photo.key!r}: {photo.problem}")
                    continue
                found = annotate(photo, shard)
                if isinstance(found, str):
                    unlabelled.add(f"{shard.place}: photo {photo.key!r}: {found}")
                    continue
                names.append(shard.read_by(photo))
                keys.append(key64("sample", shard.name, photo.key))
                rows.append((number, *photo.extent, *found))
        except SourceError as error:
            if not skip:
                raise
            unusable.add(f"{shard.place}: {error.what}")
        columns = np.array(rows, np.int64).reshape(-1, 3 + width).T
        kept = None if held is None else bytes(held)
        return cls(Names.of(names), columns, np.array(keys, np.uint64), passed_over, unlabelled, unusable, kept)


class Unpacked:
    """How many bytes of whole shards are in memory; shards are looked through side by side."""

    def __init__(self) -> None:
        self._bytes, self._lock = 0, threading.Lock()

    def into(self, held: bytearray, shard: Shard, why: OneByOneError) -> Callable[[PassedOver], Iterator[Photo]]:
        """Return what gives the photos of a shard with their places in `held`, where their bytes are put.

        why: of the shard; raised anew where memory must not hold more.
        """

        def places(passed_over: PassedOver) -> Iterator[Photo]:
            for photo in shard.photos(passed_over):
                yield replace(
                    photo,
                    data=b"",
                    mask_data=b"",
                    extent=self._put(held, photo.data, why) if photo.data else None,
                    mask=self._put(held, photo.mask_data, why) if photo.mask_data else None,
                )

        return places

    def _put(self, held: bytearray, data: bytes, why: OneByOneError) -> Extent:
        with self._lock:
            self._bytes += len(data)
            if self._bytes > MOST_UNPACKED:
                what = f"{why.what}; at most {MOST_UNPACKED >> 30} GB of such photos are held in memory"
                raise OneByOneError(what, where=why.where, todo=why.todo)
        held += data
        return Extent(len(held) - len(data), len(data))


def broken_photo(key: str, problem: str, place: str) -> SourceError:
    """Return the error that names a photo that cannot be used."""
    todo = "mend it, or leave broken photos out: --on-error skip"
    return SourceError(f"photo {key!r}: {problem}", where=place, todo=todo)


def _require_class(photo: Photo, shard: Shard) -> None:
    if photo.label is not None and photo.label < 0:
        what = f"photo {photo.key!r} is of class {photo.label}; classes count from 0 on"
        raise ConfigError(what, where=shard.place, todo="number the classes from 0 on")
