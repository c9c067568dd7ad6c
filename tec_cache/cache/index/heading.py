"""What an index says of itself and, in sum, of the units in it."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from tec_cache.cache.schema import Int64, MaybeSha256, Positive, Sha256, Size

T = TypeVar("T", bound="Heading")


class Heading(msgspec.Struct, kw_only=True):
    """Of any index."""

    identity: Sha256
    """Fingerprint of cache.json, or of target.json."""
    packed: bool
    """Whether it is a pack's: positions are those of members of the pack's tars."""
    num_views: Annotated[int, Meta(ge=0, le=10_000)]
    """Every group is there in the first so many views, and nothing else is."""

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        return msgspec.json.encode(self, order="sorted")

    @classmethod
    def read(cls: type[T], data: bytes) -> T:
        """Read it back. Raises ValueError for anything else."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.DecodeError as error:  # a wrong type too
            raise ValueError(f"its heading: {error}") from None


class Labels(msgspec.Struct, kw_only=True):
    """Labels of the photos in view 0."""

    photos: Size = 0
    labelled: Size = 0
    classes: Size = 0
    """Different labels."""
    first: Int64 | None = None
    last: Int64 | None = None


class ViewsHeading(Heading, kw_only=True, tag="views"):
    """Of the units of views."""

    content_sha256: Sha256
    """Of records/content.json, the whole document: what the photos were."""
    groups: list[Size]
    """Number of groups of each source shard."""
    labels: Labels
    passed_over: dict[str, Size]
    """Kind -> how many things in the source are no photos."""
    damaged: dict[str, str]
    """Number of a source shard -> why reading it ended early."""


class TargetsHeading(Heading, kw_only=True, tag="targets"):
    """Of the units of a target set."""

    codec_sha256: MaybeSha256
    """Of the codec's parameters."""
    arrays: list[str]
    """Stored arrays, in the order of the details."""
    block_rows: Positive
