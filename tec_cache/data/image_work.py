"""The image work of stage one: photos to crops, and stored crops to pixels. In a thread or in a process, it is this."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tec_cache.cache.pixels import JpegSettings, decode_resized
from tec_cache.data.photos import Photo
from tec_cache.data.views import CutPhoto, ViewPlan, cut_photo


@dataclass(frozen=True)
class Cutting:
    """Which views are cut of the photos of a source shard, and how."""

    shard: str
    plan: ViewPlan
    numbers: tuple[int, ...]
    """Of the views; none where the photos are only hashed."""
    jpeg: JpegSettings


class Seen(NamedTuple):
    """What is known of a photo once it was looked at."""

    sha256: bytes
    """Of the file, as it was read."""
    cut: CutPhoto


def cut_photos(cutting: Cutting, photos: Sequence[Photo]) -> list[Seen]:
    """Hash each photo, decode it once and cut its views."""
    how = cutting.plan, cutting.numbers, cutting.jpeg
    return [
        Seen(
            hashlib.sha256(photo.data).digest(),
            cut_photo(photo, cutting.shard, *how) if cutting.numbers else CutPhoto([]),
        )
        for photo in photos
    ]


def decode_crops(crops: Sequence[bytes], out: npt.NDArray[np.uint8]) -> None:
    """Decode stored crops to `out`, (B, S, S, 3) uint8 RGB. Raises ValueError for damaged ones."""
    for crop, place in zip(crops, out, strict=True):
        decode_resized(crop, place)
