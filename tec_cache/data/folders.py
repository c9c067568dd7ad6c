"""A folder of photos, treated as if it were shards."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from tec_cache.cache.record import hash_keys
from tec_cache.data.contents import Contents, folder_contents
from tec_cache.data.passed_over import PassedOver, passed_over_text
from tec_cache.data.photos import MASK_SUFFIX, MOST_PHOTO_BYTES, Extent, Home, Photo, Shard, mask_name, plain_text
from tec_cache.data.readers import NOUNS
from tec_cache.data.walk import Walk, walk
from tec_cache.errors import LayoutError, SourceError, listed
from tec_cache.printable import counted
from tec_cache.rng import key64, permutation
from tec_cache.store.local import read_regular

FOLDER_SHARD = 1024
"""Photos per shard when a folder is cut into shards."""

EMPTY_FOLDERS = "folders without photos"

_SPLIT = re.compile(
    r"(train|training|val|valid|validation|test|testing|dev|eval)([-_ ]?(set|images?|imgs?|data|[0-9]+))*",
    re.IGNORECASE,
)
"""Names of the parts of a data set."""
_SPLIT_FILE = re.compile(r"(.+?)-[0-9]+-of-[0-9]+(?:-[0-9a-f]+)?(\.[^.]+)")
"""Names of its files on the Hugging Face hub: its part, number and count."""


@dataclass(frozen=True)
class FolderShard(Shard):
    """A part of a folder of photos; labels are the numbers of the class folders."""

    in_bytes: ClassVar[bool] = False
    labels_in_field: ClassVar[bool] = False

    root: Path
    files: tuple[str, ...]
    classes: tuple[str, ...] | None
    """None for a folder without class folders."""
    masks: frozenset[str] | None = None
    """Paths of all masks in the folder, where these are asked for."""

    @property
    def place(self) -> str:
        """The folder."""
        return f"{self.root} (part {self.name})"

    @functools.cached_property
    def contents(self) -> Contents:
        """Names and sizes of the photos, and the beginning of two."""
        return folder_contents([(plain_text(key), self.root / key) for key in self.files])

    def identity(self) -> dict[str, Any]:
        """Name, contents, and the hash of the photos' names, which decide what is in it."""
        return super().identity() | {"files_sha256": self.files_sha256}

    @property
    def files_sha256(self) -> str:
        """Hash of the photos' names, in their order."""
        return hash_keys(plain_text(key) for key in self.files)

    def with_classes(self, classes: tuple[str, ...]) -> FolderShard:
        """Return the same part with labels that are numbers of these classes."""
        return replace(self, classes=classes)

    def mask_names(self) -> Iterator[str]:
        """Yield the paths of its masks, which are among its photos as long as nobody asks for masks."""
        return (name for name in self.files if name.lower().endswith(MASK_SUFFIX))

    def with_masks(self, beside: frozenset[str]) -> FolderShard:
        """Return the same part with the masks of its photos, wherever they lie in the folder's order."""
        files = tuple(file for file in self.files if file not in beside)
        return replace(self, masks=beside, files=files, size=len(files))

    def photos(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the photos in the order of the seeded permutation; all else was counted when the folder was read."""
        for file in self.files:
            label, note = self._label(file)
            try:
                yield Photo(plain_text(file), read_regular(self.root / file, MOST_PHOTO_BYTES), label, note=note)
            except OSError as error:
                yield Photo(plain_text(file), b"", label, f"cannot be read: {error.strerror}", note)

    def places(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the photos in the same order, without looking at their files."""
        for number, file in enumerate(self.files):
            label, note = self._label(file)
            mask = Extent(-1, -1) if self.masks is not None and mask_name(file) in self.masks else None
            yield Photo(plain_text(file), b"", label, note=note, extent=Extent(number, -1), mask=mask)

    def home(self) -> Home:
        """Return what reads single photos."""
        return FolderHome(self.place, self.root)

    def read_by(self, photo: Photo) -> str:
        """Return the path of a photo that has its extent."""
        return photo.key if photo.extent is None else self.files[photo.extent.offset]

    def _label(self, file: str) -> tuple[int | None, str]:
        """Return the label of a photo, and a note where it has none although others do."""
        if self.classes is None:
            return None, ""
        folder, slash, _ = file.partition("/")
        if not slash:
            return None, "it lies beside the class folders, so it has no label"
        number = self._numbers.get(plain_text(folder))
        if number is None:
            return None, f"its folder {plain_text(folder)!r} is none of the {counted(len(self.classes), 'class')}"
        return number, ""

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes or ())}


@dataclass(frozen=True)
class FolderHome(Home):
    """A folder of photos, each a file."""

    has_files: ClassVar[bool] = True

    place: str
    root: Path

    def read(self, name: str, extent: Extent) -> bytes:
        """Read a photo by its path below the folder."""
        try:
            return read_regular(self.root / name, MOST_PHOTO_BYTES)
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class PhotoFolder:
    """A folder of photos as shards, and what was seen of it."""

    shards: list[FolderShard]
    classes: tuple[str, ...] | None
    """The class folders, sorted; None for a flat folder."""
    passed_over: PassedOver
    remarks: tuple[str, ...]
    """What was assumed of it, for people."""


def open_folder(root: Path, seed: int) -> PhotoFolder:
    """Cut a folder of photos into shards by a seeded permutation, so that no shard holds one class only.

    Classes are the folders right below it that hold a photo, at whatever depth. Raises SourceError where there are no
    photos, and LayoutError where the folders below are train, val and the like, with the classes in them.
    """
    seen = walk(root)
    if not seen.photos:
        raise _no_photos(root, seen)
    refuse_splits(root, seen.photos)
    folders = sorted({file.partition("/")[0] for file in seen.photos if "/" in file})
    classes = tuple(map(plain_text, folders)) or None
    if empty := len(seen.folders - set(folders)):
        seen.passed_over.add(EMPTY_FOLDERS, empty)
    order = permutation(key64("folder", seed, len(seen.photos)), len(seen.photos))
    files = [seen.photos[i] for i in order]
    parts = [tuple(files[i : i + FOLDER_SHARD]) for i in range(0, len(files), FOLDER_SHARD)]
    shards = [FolderShard(f"folder-{i:06d}", len(part), root, part, classes) for i, part in enumerate(parts)]
    return PhotoFolder(shards, classes, seen.passed_over, tuple(_remarks(seen.photos, folders)))


def refuse_splits(root: Path, photos: Iterable[str]) -> None:
    """Raise LayoutError where folders named train, val and the like stand where the classes are expected."""
    folders = [folder.split("/") for folder in {file.rpartition("/")[0] for file in photos} if folder]
    split: set[str] = set()
    for names in folders:
        depth = next((i for i, name in enumerate(names[:-1]) if _SPLIT.fullmatch(name)), None)
        if depth is not None:
            split.add("/".join(names[: depth + 1]))
    tops = {names[0] for names in folders}
    if not split and len(tops) > 1 and all(map(_SPLIT.fullmatch, tops)):
        split = tops  # photos right in train/ and val/: there are no classes
    if split:
        places = [str(root / name) for name in sorted(split)]
        raise LayoutError(
            f"the classes would be the parts of a data set ({', '.join(sorted({Path(p).name for p in places}))}), "
            "and the photos of all parts would be mixed",
            where=str(root),
            todo=f"give one of {listed(places, 4)}; or rename a folder that is a class",
        )


def refuse_split_files(names: Iterable[str], where: str) -> None:
    """Raise LayoutError where files of one folder or pattern are called train-00000-of-00009, test-00000-of-00002."""
    every = {match[1]: match[2] for name in names if (match := _SPLIT_FILE.fullmatch(name))}
    splits = {name: suffix for name, suffix in every.items() if _SPLIT.fullmatch(name)}
    if len(splits) > 1:
        folder = where if not any(letter in where for letter in "*?[") else where.rpartition("/")[0]
        patterns = [f"'{folder.rstrip('/')}/{split}-*{suffix}'" for split, suffix in sorted(splits.items())]
        raise LayoutError(
            f"the parts of a data set lie here together ({', '.join(sorted(splits))}), and their photos would be mixed",
            where=where,
            todo=f"give one of {listed(patterns, 4)}; or, if all are meant, list them in braces",
        )


def _remarks(photos: Sequence[str], folders: Sequence[str]) -> Iterator[str]:
    deeper = [file for file in photos if file.count("/") > 1]
    if not deeper:
        return
    lie = "lies" if len(deeper) == 1 else "lie"
    text = f"{len(deeper):,} of {counted(len(photos), 'photo')} {lie} deeper than CLASS/NAME: "
    yield text + "the class is the first folder"
    below = {PurePosixPath(*PurePosixPath(file).parts[:2]) for file in deeper}
    if len(folders) == 1 and len(below) > 1 and len(deeper) == len(photos):
        yield f"all of them are in {plain_text(folders[0])}: give that folder, if those in it are the classes"


def _no_photos(root: Path, seen: Walk) -> SourceError:
    passed = f"; in it: {passed_over_text(seen.passed_over)}" if seen.passed_over else ""
    deeper = (
        f", or what its folders hold: '{(root / seen.shard).parent}/*{Path(seen.shard).suffix}'" if seen.shard else ""
    )
    return SourceError(
        f"the folder holds neither photos nor {' nor '.join(NOUNS)}{passed}",
        where=str(root),
        todo=f"give a folder of CLASS/NAME.jpg, or a pattern such as 'shards/*.tar'{deeper}",
    )
