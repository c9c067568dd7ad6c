"""What every kind of source gives: shards, and photos in them one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from tec_cache.data.contents import Contents
from tec_cache.data.labels import Label, Labels
from tec_cache.data.passed_over import PassedOver
from tec_cache.errors import ConfigError

IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "pbm", "pnm"}
)

MOST_PHOTO_BYTES = (1 << 29) + (1 << 20)
"""Of a photo as it lies in a file. The largest that is decoded (images.MAX_PIXELS) takes half a gigabyte without
compression, in three channels of 16 bits; what is larger is no photo, and is not read into memory."""


MASK_SUFFIX = ".seg.png"
"""What the mask of KEY.jpg has in the place of its suffix: the class of each pixel."""


class Extent(NamedTuple):
    """Where a file's bytes lie in a shard."""

    offset: int
    """Of its first byte in a plain tar; its number among the files of a part of a folder, or the rows of a table."""
    size: int
    """Bytes; -1 in a folder and in a table, whose photos are not looked at."""


@dataclass(frozen=True)
class Photo:
    """One sample of a source shard: its key, the bytes of its image, its label where there is one.

    `problem` says why it cannot be used; then `data` is empty. A photo with a problem still has its place.
    `note` says what of it was not understood and is not needed, a label for one; it is counted and kept.
    """

    key: str
    data: bytes
    label: int | None
    problem: str = ""
    note: str = ""
    extent: Extent | None = None
    """Instead of its bytes, where `Shard.places` gives it."""
    mask: Extent | None = None
    """Of its mask, in a shard whose masks are asked for."""
    mask_data: bytes = b""
    """Instead of that, where its bytes are read as well."""


class Home(ABC):
    """Where the photos of a shard lie, to be read one at a time and in any order."""

    place: str
    """For messages."""
    has_files: ClassVar[bool] = False
    """Whether each photo is a file of its own, whose path is its key."""

    @abstractmethod
    def read(self, name: str, extent: Extent) -> bytes:
        """Read a photo; name: what `Shard.read_by` gives.

        Raises SourceError where it is not what it was when the shard was looked through, StorageError where the disk or
        the network fails.
        """

    def reopened(self) -> Home:
        """Return the same with connections of its own: they do not survive a fork."""
        return self


class OneByOneError(ConfigError):
    """A shard whose photos cannot be read one at a time where they lie, so that memory must hold all of them."""


@dataclass(frozen=True)
class Shard(ABC):
    """A source shard: its name is part of every sample's identity, so it holds no folder of one machine.

    Whoever uses shards asks them, and never what kind they are of: a new kind is a file and its line in `readers`.
    """

    in_bytes: ClassVar[bool]
    """Whether its size is in bytes, and not in photos."""
    labels_in_field: ClassVar[bool]
    """Whether its labels are in a field of each sample, and have to be found; a folder's are its class folders."""

    name: str
    size: int
    """Bytes of a file, or number of photos of a part of a folder."""

    @abstractmethod
    def photos(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the photos in order, counting what is none.

        Raises SourceError at the point where the shard is damaged, and LayoutError where its photos would be read
        wrongly.
        """

    @abstractmethod
    def places(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the same photos without their bytes, each with its `extent`, to be read by itself.

        Raises what `photos` raises, and OneByOneError for a shard whose photos cannot be read at random.
        """

    @abstractmethod
    def home(self) -> Home:
        """Return what reads single photos by the extents that `places` gives."""

    def read_by(self, photo: Photo) -> str:
        """Return the name by which `home` reads a photo: its key, unless that has lost bytes that are no UTF-8."""
        return photo.key

    @abstractmethod
    def with_classes(self, classes: tuple[str, ...]) -> Shard:
        """Return the same shard with labels that are numbers of these classes."""

    def with_labels(self, labels: Labels) -> Shard:
        """Return the same shard with labels that are where `labels` says, if they are in a field."""
        return self

    def label_values(self, labels: Labels) -> Iterator[tuple[Label, dict[str, bytes]]]:
        """Yield the label of each photo as it is written, if it is in a field, and the sample's other fields.

        Bytes are read of a few fields only. Raises what `photos` raises.
        """
        return iter(())

    def class_names(self, labels: Labels) -> tuple[str, ...] | None:
        """Return the names of the classes in the order of their numbers, where the shard says them beside its photos.

        Raises what `photos` raises.
        """
        return None

    def looked_for(self, labels: Labels) -> str:
        """Say where a label is looked for, for people."""
        return "class folders"

    def mask_names(self) -> Iterator[str]:
        """Yield the paths of masks that are files of a folder."""
        return iter(())

    @abstractmethod
    def with_masks(self, beside: frozenset[str]) -> Shard:
        """Return the same shard with the masks of its photos, which are then no photos of their own.

        beside: paths of all masks of a folder (`mask_names` of all its parts), relative to it; a tar has its own.
        Raises ConfigError for a kind of shard that has no masks.
        """

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it is, for messages."""

    @cached_property
    @abstractmethod
    def contents(self) -> Contents:
        """What tells it from another of its name; read once. Raises StorageError."""

    @property
    def files_sha256(self) -> str | None:
        """Hash of the names of the files that are its photos, in their order; None where they are no files."""
        return None

    def identity(self) -> dict[str, Any]:
        """What the identity of a cache says of this shard."""
        return {"name": self.name, **self.contents.to_json()}


def mask_name(name: str) -> str:
    """Return the name of a photo's mask."""
    return name.rpartition(".")[0] + MASK_SUFFIX


def plain_text(name: str) -> str:
    """Return a file name that can be encoded: bytes that are not UTF-8 become \\udcff and the like."""
    return name.encode("utf-8", "backslashreplace").decode()
