"""The view plan: which part of a photo a view shows, as a pure function of (seed, shard, key, view number)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from tec_cache.cache.pixels import JpegSettings, encode_crop, resized
from tec_cache.data.images import decode_photo
from tec_cache.data.photos import Photo
from tec_cache.errors import ConfigError, SourceError
from tec_cache.rng import key64, uniform


class View(NamedTuple):
    """A crop box in pixels of the upright photo, and whether it is mirrored afterwards."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


@dataclass(frozen=True, kw_only=True)
class ViewPlan:
    """How views are cut; part of the identity of a cache."""

    crop: Literal["random", "center"] = "random"
    """random: RandomResizedCrop; center: the shorter side to size * 8/7, then the middle (evaluation)."""
    size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a random crop, as a share of the photo."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random crop."""
    flip: float = 0.5
    """Probability of mirroring."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop not in ("random", "center"):
            raise ConfigError(f"unknown crop {self.crop!r}", todo="choose one of: random, center")
        if self.size < 1:
            raise ConfigError(f"views of {self.size} pixels", todo="give --size 1 or more")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"crop scale {self.scale}", todo="give 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"crop ratio {self.ratio}", todo="give 0 < smallest <= largest")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip probability {self.flip}", todo="give a number from 0 to 1")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values = asdict(self)
        return values | {"scale": list(self.scale), "ratio": list(self.ratio)}

    def view(self, shard: str, key: str, number: int, width: int, height: int) -> View:
        """Return view `number` of the photo `key` of source shard `shard`, which is width x height pixels."""
        if self.crop == "center":
            return _center(width, height)
        # 10 tries of (area, ratio), then left, top, flip: always the same count, so that no number depends on
        # how many tries were needed
        numbers: list[float] = uniform(key64("view", self.seed, shard, key, number), 23).tolist()
        flip = numbers[22] < self.flip
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area_draw, ratio_draw in zip(numbers[0:20:2], numbers[1:20:2], strict=True):
            area = width * height * (self.scale[0] + area_draw * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + ratio_draw * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(numbers[20] * (width - w + 1)), int(numbers[21] * (height - h + 1))
                return View(left, top, w, h, flip)
        return _fallback(width, height, self.ratio)._replace(flip=flip)

    def cut(self, photo: Image.Image, view: View) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Cut a view out of an upright RGB photo: (size, size, 3) uint8."""
        box = (view.left, view.top, view.left + view.width, view.top + view.height)
        # cropped first: with `box`, resize would also look at pixels beside it
        crop = resized(photo.crop(box), self.size)
        # Pillow mirrors a crop in a sixth of the time that numpy takes
        return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else crop)


class CutPhoto(NamedTuple):
    """Views of a photo."""

    jpegs: list[bytes]
    problem: str = ""
    """Why there are none, where the photo is broken."""
    note: str = ""
    """What of the file was not understood, and not needed."""


def cut_photo(photo: Photo, shard: str, plan: ViewPlan, numbers: Sequence[int], jpeg: JpegSettings) -> CutPhoto:
    """Decode a photo once and cut some of its views."""
    if photo.problem:
        return CutPhoto([], photo.problem)
    try:
        image, note = decode_photo(photo.data)
    except SourceError as error:
        return CutPhoto([], error.what)
    views = (plan.view(shard, photo.key, number, image.width, image.height) for number in numbers)
    return CutPhoto([encode_crop(plan.cut(image, view), jpeg) for view in views], note=note)


def _center(width: int, height: int) -> View:
    """Return the square in the middle, 7/8 of the shorter side: resize to size * 8/7 and centre crop in one."""
    edge = max(1, round(min(width, height) * 7 / 8))
    return View((width - edge) // 2, (height - edge) // 2, edge, edge, False)


def _fallback(width: int, height: int, ratio: tuple[float, float]) -> View:
    """Return the largest centred box whose ratio is allowed, for photos that no try fits (torchvision's rule)."""
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = min(width, max(1, round(height * ratio[1])))
    return View((width - w) // 2, (height - h) // 2, w, h, False)
