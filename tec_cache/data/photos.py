"""What every kind of source gives: shards, and photos in them one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from tec_cache.data.contents import Contents
from tec_cache.data.passed_over import PassedOver

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
    """Of its first byte in a plain tar; its number among the files of a part of a folder."""
    size: int
    """Bytes; -1 in a folder, whose files are not looked at."""


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


@dataclass(frozen=True)
class Shard(ABC):
    """A source shard: its name is part of every sample's identity, so it holds no folder of one machine."""

    name: str
    size: int
    """Bytes of the tar, or number of photos of a part of a folder."""

    @abstractmethod
    def photos(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the photos in order, counting what is none.

        Raises SourceError at the point where the shard is damaged, and LayoutError where its photos would be read
        wrongly.
        """

    @abstractmethod
    def places(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the same photos without their bytes, each with its `extent`, to be read by itself.

        Raises what `photos` raises, and ConfigError for a shard whose photos cannot be read at random.
        """

    @abstractmethod
    def with_classes(self, classes: tuple[str, ...]) -> Shard:
        """Return the same shard with labels that are numbers of these classes."""

    @abstractmethod
    def with_masks(self, beside: frozenset[str]) -> Shard:
        """Return the same shard with the masks of its photos, which are then no photos of their own.

        beside: paths of all masks of a folder, relative to it; a tar has its own.
        """

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it is, for messages."""

    @cached_property
    @abstractmethod
    def contents(self) -> Contents:
        """What tells it from another of its name; read once. Raises StorageError."""

    def identity(self) -> dict[str, Any]:
        """What the identity of a cache says of this shard."""
        return {"name": self.name, **self.contents.to_json()}


def mask_name(name: str) -> str:
    """Return the name of a photo's mask."""
    return name.rpartition(".")[0] + MASK_SUFFIX


def plain_text(name: str) -> str:
    """Return a file name that can be encoded: bytes that are not UTF-8 become \\udcff and the like."""
    return name.encode("utf-8", "backslashreplace").decode()
