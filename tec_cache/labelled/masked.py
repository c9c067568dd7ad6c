"""Photos with masks: the class of each pixel instead of one of the whole."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from tec_cache.background import in_order
from tec_cache.data.images import decode_photo
from tec_cache.data.masks import decode_mask
from tec_cache.data.photos import Extent, Photo, Shard, mask_name
from tec_cache.data.source import Source
from tec_cache.errors import ConfigError, SourceError
from tec_cache.labelled.index import PhotoIndex, broken_photo, column_hash, look_through
from tec_cache.mask_values import Values
from tec_cache.progress import Progress

MaskTransform = Callable[[Image.Image, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From an upright RGB photo and its classes, (H, W) int32, to (3, h, w) float32 and (h', w') int64."""

DECODERS = 8
"""Masks that are decoded at the same time where all are looked at."""
ROUNDED = 1.0
"""Pixels of a mask by which its sides may differ from the photo's aspect: it may have been made smaller."""


@dataclass(frozen=True)
class MaskedIndex(PhotoIndex):
    """Photos, each with a mask. mask_offset, mask_size: (N,) int64, in the tar of the photo; -1 in a folder."""

    COLUMNS: ClassVar[tuple[str, ...]] = (*PhotoIndex.COLUMNS, "mask_offset", "mask_size")
    ANNOTATION: ClassVar[str] = "mask"

    mask_offset: npt.NDArray[np.int64] = field(kw_only=True)
    mask_size: npt.NDArray[np.int64] = field(kw_only=True)
    values: Values | None = None
    """None until it is known: then only `mask` can be had."""

    def mask(self, number: int) -> npt.NDArray[np.int32]:
        """Return the values of a photo's mask, (H, W). Raises as `read` does, and SourceError for what is no mask."""
        extent = Extent(int(self.mask_offset[number]), int(self.mask_size[number]))
        return decode_mask(self.homes[self.shard[number]].read(mask_name(self.names[number]), extent))

    def example(self, number: int, transform: MaskTransform) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pixels and the classes that a transform makes of a photo and its mask."""
        assert self.values is not None, "whoever learns has looked at them"
        photo = decode_photo(self.read(number)).image
        values = self.mask(number)
        height, width = values.shape
        if not _alike(width, height, photo.width, photo.height):
            what = f"its mask has {width} x {height} pixels, the photo {photo.width} x {photo.height}"
            turned = _alike(height, width, photo.width, photo.height)
            why = "it must be of the upright photo, as EXIF turns it" if turned else "they are not of one picture"
            raise SourceError(f"{what}: {why}")
        try:
            classes = self.values.classes(values)
        except ConfigError as error:
            where = f"{self.place(number)}: photo {self.key(number)!r}"
            raise ConfigError(error.what, where=where, todo=error.todo) from error
        return transform(photo, torch.from_numpy(classes))

    def fingerprint(self) -> str:
        """Return what tells these photos and masks from others, as hex: keys, sizes, names of classes, values."""
        return column_hash(self.classes, self.sample_keys, self.size, self.mask_size, np.array(self.values or ()))


def _alike(width: int, height: int, photo_width: int, photo_height: int) -> bool:
    """Say whether a mask has the aspect of a photo, but for rounding."""
    scale = ((width / photo_width) * (height / photo_height)) ** 0.5
    return max(abs(width - scale * photo_width), abs(height - scale * photo_height)) <= ROUNDED


def index_masked_photos(source: Source, *, quiet: bool = True, on_error: str = "stop") -> MaskedIndex:
    """Look through all shards for their photos and masks; of local tars only headers are read.

    source: with masks (`Source.with_masks`). on_error, quiet, errors: of `labelled.index.look_through`.
    """

    def mask_of(photo: Photo, shard: Shard) -> tuple[int, ...] | str:
        return "no mask" if photo.mask is None else tuple(photo.mask)

    todo = "the mask of KEY.jpg is KEY.seg.png beside it, in a tar as in a folder"
    found, masks = look_through(source, mask_of, MaskedIndex.ANNOTATION, 2, todo, quiet=quiet, on_error=on_error)
    offset, size = masks
    return MaskedIndex(**found, mask_offset=offset, mask_size=size)


def highest_value(index: MaskedIndex, ignore: int, *, quiet: bool = True, on_error: str = "stop") -> int:
    """Return the highest value of all masks that is not ignored: each of them is decoded, 1 ms of a core or more.

    Raises SourceError for a mask that is not whole, unless on_error is "skip".
    """

    def highest(number: int) -> int:
        try:
            values = index.mask(number)
        except SourceError as error:
            if on_error == "skip":
                return 0
            raise broken_photo(index.key(number), error.what, index.place(number)) from error
        return int(values.max(initial=0, where=values != ignore))

    found = 0
    with (
        Progress("classes of the masks", noun="mask", total=len(index), quiet=quiet) as progress,
        ThreadPoolExecutor(DECODERS, thread_name_prefix="masks") as pool,
    ):
        for value in in_order(pool, highest, range(len(index)), DECODERS):
            found = max(found, value)
            progress.advance(1)
    return found
