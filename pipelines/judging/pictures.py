"""Predicted masks as files: for programs as classes, for people as colours over the photo."""

from __future__ import annotations

import colorsys
import hashlib
import json
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from PIL import Image

from tec_cache.data.images import decode_photo
from tec_cache.data.masks import encode_mask
from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.labelled.masked import MaskedIndex
from tec_cache.mask_values import NO_CLASS
from tec_cache.store.files import make_folder, write_atomically

MARK = "predictions.json"
"""Says that a folder is one of predictions."""
MOST_NAME = 150
"""Bytes of a part of a name; file systems take 255, drafts need some of them."""
MOST_SIDE = 4096
"""Pixels of a picture's side: a JPEG has 65,500 at most."""
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

    KEY is a photo's key, or its path below the folder without suffix. What no file can be called is written as %XX, a
    part of more than MOST_NAME bytes is cut. Where photos share a key, each lies in a folder of its shard's number.
    """

    def __init__(self, folder: Path, index: MaskedIndex) -> None:
        assert index.values is not None
        self.folder, self.index, self.values = folder, index, index.values
        self.colours = palette(index.values.num_classes)
        keys = [self._key(number) for number in range(len(index))]
        self.apart = len(set(keys)) < len(keys)

    def _key(self, number: int) -> PurePosixPath:
        in_folder = self.index.homes[self.index.shard[number]].has_files
        key = self.index.key(number)
        parts = PurePosixPath(key.rpartition(".")[0] if in_folder else key).parts
        return PurePosixPath(*(_file_name(part) for part in parts if part != "/"))

    def path(self, number: int) -> Path:
        """Path of a photo's files, without suffix; no key leads out of the folder."""
        return self.folder.joinpath(*([f"{self.index.shard[number]:06d}"] if self.apart else []), self._key(number))

    def write(self, number: int, classes: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> None:
        """Write the files of a photo; classes, predicted: (H, W). Raises TecCacheError where that is impossible."""
        path = self.path(number)
        try:
            make_folder(path.parent)
            path.with_name(path.name + ".png").write_bytes(encode_mask(self.values.values(predicted)))
            strip = self._strip(decode_photo(self.index.read(number)).image, classes, predicted)
            strip.save(path.with_name(path.name + ".jpg"), quality=90)
        except OSError as error:
            raise TecCacheError(
                f"a prediction cannot be written: {error.strerror or error}",
                where=str(path),
                todo="the model is saved; the same command with another --save-predictions judges it again",
            ) from error

    def _strip(
        self, photo: Image.Image, classes: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]
    ) -> Image.Image:
        """Put photo, truth and prediction side by side, no wider than a JPEG may be."""
        height, width = classes.shape
        small = max(1.0, max(width, height) / MOST_SIDE)
        size = max(1, round(width / small)), max(1, round(height / small))
        parts = [photo.resize((width, height))]
        parts += [picture(photo, found, self.colours) for found in (classes, predicted)]
        strip = Image.new("RGB", (3 * size[0], size[1]))
        for number, part in enumerate(parts):
            strip.paste(part if part.size == size else part.resize(size), (number * size[0], 0))
        return strip


def require_place(folder: Path) -> None:
    """Refuse a folder in which something lies that this program did not write: names of predictions are photos' names.

    Raises ConfigError.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise ConfigError("--save-predictions is no folder", where=str(folder), todo="name another folder")
    if any(folder.iterdir()) and not (folder / MARK).is_file():
        todo = "name a new folder, or an empty one"
        raise ConfigError("--save-predictions would write among other files", where=str(folder), todo=todo)


def mark_place(folder: Path, run: str) -> None:
    """Make a folder one of predictions. Raises TecCacheError where that is impossible."""
    try:
        make_folder(folder)
        write_atomically(folder / MARK, json.dumps({"predictions": "tec-cache segment", "run": run}).encode() + b"\n")
    except OSError as error:
        todo = "name another folder for --save-predictions"
        raise TecCacheError(f"the folder cannot be made: {error.strerror}", where=str(folder), todo=todo) from error


def _file_name(part: str) -> str:
    """Return a part of a key as a part of a path: as it is, but for what leads elsewhere or cannot be printed."""
    plain = "".join(c if c.isprintable() and c not in '%\\:*?"<>|' else quote(c, safe="") for c in part)
    plain = plain.replace(".", "%2E") if not plain.strip(".") else plain
    if len(plain.encode()) > MOST_NAME:
        mark = hashlib.sha256(part.encode()).hexdigest()[:12]
        plain = plain.encode()[:MOST_NAME].decode(errors="ignore") + "-" + mark
    return plain
