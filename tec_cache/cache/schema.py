"""What the fields of every JSON document of a cache may hold: types, and bounds of numbers.

A document that is sealed and yet not as it stands here is damage like any other. Fields that this version does not
know are not looked at: later programs of the same format version may add some that need not be understood.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from tec_cache.codec import CODECS
from tec_cache.printable import counted
from tec_cache.types import TargetSpec

T = TypeVar("T")

Size = Annotated[int, Meta(ge=0, le=2**53)]
"""Bytes, or a number of things: exact in every language."""
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Crc32 = Annotated[int, Meta(ge=0, lt=2**32)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
MaybeSha256 = Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")]
"""Empty where there is nothing that could be hashed."""
Share = Annotated[float, Meta(ge=0, le=1)]
Real = Annotated[float, Meta(gt=0, le=1e300)]
Error = Annotated[float, Meta(ge=0, le=1e300)]
Pixels = Annotated[int, Meta(ge=1, le=65_535)]
"""No JPEG has more to a side."""
Pair = Annotated[list[str], Meta(min_length=2, max_length=2)]
Block = Annotated[list[Size], Meta(min_length=3, max_length=3)]
SetName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z")]

MOST_OPEN = 16
"""Levels of lists and objects in what is open to any content."""


class _Document(msgspec.Struct, kw_only=True):
    """An object that has these fields, and perhaps others."""


class Views(_Document):
    """How views are cut: `data.views.ViewPlan`."""

    crop: Literal["random", "center"]
    size: Pixels
    scale: tuple[Share, Share]
    ratio: tuple[Real, Real]
    flip: Share
    seed: Int64


class Jpeg(_Document):
    """How crops are stored: `cache.pixels.JpegSettings`."""

    quality: Annotated[int, Meta(ge=1, le=100)]
    subsampling: Literal["444", "422", "420"]


class SourceShard(_Document):
    """A source shard and what is known of its content before it is read."""

    name: str
    take: Size | None = None
    """Photos up to which it is read, where a limit cuts it."""
    files_sha256: Sha256 | None = None
    """Of the names of its photos, for a part of a folder."""
    size: Size | None = None
    """Bytes, for a file."""
    ends_sha256: Sha256 | None = None
    """Of its first and last bytes, for a file."""


class Source(_Document):
    """The photos."""

    limit: Size | None
    shards: list[SourceShard]


class CacheIdentity(_Document):
    """What decides the views of a cache."""

    views: Views
    jpeg: Jpeg
    resizer: str
    grid: Annotated[int, Meta(ge=1, le=1024)]
    group_size: Annotated[int, Meta(ge=1, le=65_536)]
    source: Source
    classes: list[str] | None = None
    """Names of the classes, by their numbers; null where labels are numbers, or there are none."""
    label_field: str | None = None
    """Where the labels of tars or tables were found; null where a folder's classes are the labels."""


class Coding(_Document):
    """A codec by its name, and the errors that were asked of it where it is fitted: `codec.quality.Quality`."""

    name: str
    mse: Real | UnsetType = UNSET
    kl: Real | UnsetType | None = UNSET
    fit_views: Positive | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.name not in CODECS:
            raise ValueError(f"unknown codec {self.name!r}, known are {', '.join(CODECS)}")
        if CODECS[self.name].fit is not None and UNSET in (self.mse, self.kl, self.fit_views):
            raise ValueError(f"the codec {self.name} without mse, kl or fit_views")


class Spec(_Document):
    """What a set of targets consists of: `types.TargetSpec`."""

    grid: Annotated[int, Meta(ge=1, le=1024)]
    channels: Annotated[int, Meta(ge=1, le=65_536)]
    num_heads: Annotated[int, Meta(ge=0, le=1024)]
    k: Size | Literal["all"] | None
    normalization: Literal["patch", "feature", "none"]
    columns: Annotated[int, Meta(ge=1, le=1024)] | None
    class_token: bool = False

    def __post_init__(self) -> None:
        tokens = TargetSpec(**msgspec.structs.asdict(self)).num_tokens
        if isinstance(self.k, int) and self.k > tokens:
            raise ValueError(f"{counted(self.k, 'row')} of attention from {counted(tokens, 'patch')}")
        if (self.k is None) != (self.num_heads == 0):
            raise ValueError(f"{counted(self.num_heads, 'head')}, and k is {self.k}")


class TargetIdentity(_Document):
    """What decides the targets of a set."""

    base: dict[str, Any]
    """Open: whatever tells one base from another; `weights_sha256` is always there."""
    input_size: Pixels
    resizer: str
    last_layers: Positive
    spec: Spec
    codec: Coding
    precision: str
    batch_size: Positive
    threads: Positive | None
    cache: Sha256
    device: str | None = None

    def __post_init__(self) -> None:
        require_shallow(self.base)
        if not isinstance(self.base.get("weights_sha256"), str):
            raise ValueError("the base has no weights_sha256")


class PackedSet(_Document):
    """A target set as it was packed."""

    fingerprint: Sha256
    codec_sha256: MaybeSha256
    arrays: list[tuple[str, str, list[Size]]]


class PackIdentity(_Document):
    """What decides the samples of a pack."""

    cache: Sha256
    num_views: Annotated[int, Meta(ge=1, le=10_000)]
    block_rows: Positive
    targets: dict[SetName, PackedSet]


class _Manifest(_Document):
    fingerprint: Sha256
    notes: dict[str, Any]
    """Open: what is good to know and decides nothing."""

    def __post_init__(self) -> None:
        require_shallow(self.notes)


class CacheManifest(_Manifest):
    """cache.json."""

    identity: CacheIdentity


class TargetManifest(_Manifest):
    """target.json; its notes name the base."""

    identity: TargetIdentity

    def __post_init__(self) -> None:
        require_shallow(self.notes)
        if not isinstance(self.notes.get("base"), str):
            raise ValueError("its notes do not name the base")


class PackManifest(_Manifest):
    """pack.json."""

    identity: PackIdentity


MANIFESTS: Mapping[str, type[_Manifest]] = {
    "cache": CacheManifest,
    "target": TargetManifest,
    "pack": PackManifest,
}


def read_as(kind: type[T], body: Any) -> T:
    """Turn plain JSON values into a type of this project. ValueError says which field is not as it has to be."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def require_shallow(value: Any) -> None:
    """Raise ValueError for values nested more than MOST_OPEN deep: others walk through them by recursion."""
    level = [value]
    for _ in range(MOST_OPEN):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [inner for item in nested for inner in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise ValueError(f"nested more than {MOST_OPEN} deep")


def ranges_problem(ranges: Iterable[Sequence[int]], size: int) -> str:
    """Say whether (position, bytes, ...) ranges of a file of `size` bytes overlap, fall, or leave it; else ''."""
    end = 0
    for position, length, *_ in ranges:
        if position < end or length < 1:
            return "its byte ranges overlap"
        end = position + length
    return "its byte ranges go beyond the file" if end > size else ""
