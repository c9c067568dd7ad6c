"""From the bytes of any photo to an upright RGB array."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tec_cache.data import jpeg, png, tiff_photos
from tec_cache.data.avif import is_avif, without_metadata
from tec_cache.data.orientation import upright
from tec_cache.data.stored import Stored, require_size
from tec_cache.errors import SourceError

# Named, because Pillow also knows formats that start other programs (EPS calls Ghostscript) on a stranger's bytes.
FORMATS = ("WEBP", "BMP", "GIF", "PPM")


class Decoded(NamedTuple):
    """A photo's pixels, upright and RGB."""

    image: Image.Image
    note: str = ""
    """What of the file was not understood, and not needed."""


def decode_photo(data: bytes) -> Decoded:
    """Decode a photo to an upright 8-bit RGB image.

    EXIF orientation is applied; greyscale, palette, CMYK and 16-bit images are converted; alpha is dropped (as
    torchvision's and timm's loaders do). Of an animation the first frame counts. Metadata that cannot be read are
    no reason to refuse a photo; `note` names them. Raises SourceError for anything that is not a whole image, and for
    samples whose black and white the format does not define (floating point, 32 bits).
    """
    try:
        stored = _read(data)
        image, turned = upright(stored.image, stored.exif, stored.xmp)
        if image.mode.startswith("I"):
            image = _to_eight_bits(image)
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
        return Decoded(rgb, "; ".join(filter(None, (*stored.notes, turned))))
    except UnidentifiedImageError as error:
        # Pillow's text holds an address in memory, and this one is written to the records of a cache
        raise SourceError("not an image of a known format") from error
    except Exception as error:
        # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for broken files
        raise SourceError(f"not a whole image: {error}") from error


def _read(data: bytes) -> Stored:
    """Decode a file, told by its first bytes: names lie (ImageNet has a PNG called .JPEG)."""
    if data.startswith(jpeg.MAGIC):
        return jpeg.read_jpeg(data)
    if data.startswith(png.MAGIC):
        return png.read_png(data)
    if data.startswith(tiff_photos.MAGIC):
        return tiff_photos.read_tiff(data)
    formats: tuple[str, ...] = FORMATS
    if is_avif(data):
        data, formats = without_metadata(data), ("AVIF",)
    image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    require_size(image.width, image.height)
    if image.mode == "F":
        raise ValueError("its samples are floating-point numbers, whose black and white no file says")
    image.load()
    return Stored(image, image.info.get("exif", b""), _plain_bytes(image.info.get("xmp", b"")))


def _plain_bytes(text: object) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode()


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit greyscale to 8 bits; Pillow's own convert would clip everything above 255 to white."""
    values: npt.NDArray[np.float64] = np.asarray(image, dtype=np.float64) / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
