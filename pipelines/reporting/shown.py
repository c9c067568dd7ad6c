"""The pictures that models look at: photos that were given, or stored crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipelines.reporting.crops import Crop, pixels_of
from pipelines.reporting.judged import spread
from tec_cache.base.model import FrozenBase
from tec_cache.cache.pixels import resize
from tec_cache.data.images import decode_photo
from tec_cache.data.source import open_source
from tec_cache.data.views import ViewPlan
from tec_cache.errors import SourceError

MOST_LOOKED_AT = 512
"""Photos of the first shard of an input among which some are chosen."""


@dataclass(frozen=True)
class Shown:
    """A picture by its key; whole: it is seen as it is, else its middle, as in judging."""

    key: str
    image: Image.Image
    whole: bool

    def pixels(self, size: int) -> npt.NDArray[np.uint8]:
        """Return what a model of so many pixels sees: (size, size, 3) uint8."""
        if self.whole:
            return resize(np.asarray(self.image), size)
        plan = ViewPlan(crop="center", size=size)
        return plan.cut(self.image, plan.view("", "", 0, self.image.width, self.image.height))


def given_photos(place: str, count: int) -> list[Shown]:
    """Read some photos of an input, the same ones each time; broken ones are passed over.

    Raises SourceError where there is none that can be read.
    """
    datas = []
    for shard in open_source(place).shards:
        for photo in shard.photos():
            if not photo.problem:
                datas.append((photo.key, photo.data))
            if len(datas) == MOST_LOOKED_AT:
                break
        if len(datas) >= count:
            break
    found: list[Shown] = []
    for number in [*spread(len(datas), count), *range(len(datas))]:
        key, data = datas[number]
        if len(found) == count or key in {shown.key for shown in found}:
            continue
        try:
            found.append(Shown(key, decode_photo(data).image, whole=False))
        except SourceError:
            continue
    if not found:
        raise SourceError("no photo here can be read", where=place, todo="give photos as extract takes them")
    return found


def shown_crops(crops: Sequence[Crop], count: int) -> list[Shown]:
    """Return the first view of some stored crops."""
    first = [crop for crop in crops if crop.unit.view == 0]
    return [Shown(crop.key, Image.fromarray(crop.pixels), whole=True) for crop in first[:count]]


def images_of(pictures: Sequence[Shown], model: FrozenBase) -> torch.Tensor:
    """Return pictures as a model takes them: (N, 3, S, S), normalized."""
    return pixels_of([shown.pixels(model.input_size) for shown in pictures], model)
