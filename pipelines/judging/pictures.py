"""Predicted masks as files: for programs as classes, for people as colours over the photo."""

from __future__ import annotations

import colorsys
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from PIL import Image

from tec_cache.data.images import decode_photo
from tec_cache.data.masks import encode_mask
from tec_cache.labelled.masked import MaskedIndex
from tec_cache.mask_values import NO_CLASS
from tec_cache.store.files import make_folder, write_atomically

OPACITY = 0.55
"""Of the colours over a photo."""
_GOLDEN = 0.61803398875
"""Share of the circle of hues between one class and the next: neighbours look different, whatever their number."""


def palette(num_classes: int) -> npt.NDArray[np.uint8]:
    """Return a colour for each class, (num_classes, 3)."""
    hues = [(i * _GOLDEN) % 1.0 for i in range(num_classes)]
    rows = [colorsys.hsv_to_rgb(hue, 0.9 - 0.3 * (i % 2), 1.0 - 0.25 * (i % 3)) for i, hue in enumerate(hues)]
    return np.rint(np.array(rows) * 255).astype(np.uint8)


def picture(photo: Image.Image, classes: npt.NDArray[np.int64], colours: npt.NDArray[np.uint8]) -> Image.Image:
    """Lay the colours of classes, (H, W), over a photo of any size; pixels of no class stay as they are."""
    height, width = classes.shape
    pixels = np.asarray(photo.resize((width, height)), np.float64)
    painted = colours[np.maximum(classes, 0)]
    mixed = np.where(classes[..., None] == NO_CLASS, pixels, (1 - OPACITY) * pixels + OPACITY * painted)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


class PredictionWriter:
    """Writes KEY.png, the values of predicted classes as masks have them, and KEY.jpg: photo, truth, prediction.

    Where photos of several shards have one key, each lies in a folder of its shard's number.
    """

    def __init__(self, folder: Path, index: MaskedIndex) -> None:
        assert index.values is not None
        self.folder, self.index, self.values = folder, index, index.values
        self.colours = palette(index.values.num_classes)
        self.apart = len(set(index.names)) < len(index)

    def path(self, number: int) -> Path:
        """Path of a photo's files, without suffix; no key leads out of the folder."""
        parts = [quote(part, safe=" ()[],+=@") for part in PurePosixPath(self.index.key(number)).parts]
        parts = [part.replace("..", "%2E%2E") for part in parts if part != "%2F"]
        return self.folder.joinpath(*([f"{self.index.shard[number]:06d}"] if self.apart else []), *parts)

    def write(self, number: int, classes: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> None:
        """Write the files of a photo; classes, predicted: (H, W)."""
        path = self.path(number)
        make_folder(path.parent)
        write_atomically(path.with_name(path.name + ".png"), encode_mask(self.values.values(predicted)))
        photo = decode_photo(self.index.read(number)).image
        height, width = classes.shape
        strip = Image.new("RGB", (3 * width, height))
        strip.paste(photo.resize((width, height)), (0, 0))
        strip.paste(picture(photo, classes, self.colours), (width, 0))
        strip.paste(picture(photo, predicted, self.colours), (2 * width, 0))
        strip.save(path.with_name(path.name + ".jpg"), quality=90)
