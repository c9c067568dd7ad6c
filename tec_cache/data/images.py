"""From the bytes of any photo to an upright RGB array."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tec_cache.errors import SourceError

# Where Pillow begins to warn of a decompression bomb (it refuses at twice as many). Checked by hand: turning its
# warning into an error would touch the warning filters of the whole process, and photos are decoded in threads.
MAX_PIXELS = 89_478_485

# Named, because Pillow also knows formats that start other programs (EPS calls Ghostscript) on a stranger's bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


class Decoded(NamedTuple):
    """A photo's pixels, upright and RGB."""

    image: Image.Image
    note: str = ""
    """What of the file was not understood, and not needed."""


def decode_photo(data: bytes) -> Decoded:
    """Decode a photo to an upright 8-bit RGB image.

    EXIF orientation is applied; greyscale, palette, CMYK and 16-bit images are converted; alpha is dropped (as
    torchvision's and timm's loaders do). Raises SourceError for anything that is not a whole image.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise SourceError(f"{image.width} x {image.height} pixels are too many")
        sixteen = image.format in ("PNG", "PPM")  # their deep greyscale, in mode I or I;16, ends at 65535
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_eight_bits(image, sixteen or image.mode.startswith("I;16"))
        return Decoded(image.convert("RGB"))
    except SourceError:
        raise
    except UnidentifiedImageError as error:
        # Pillow's text holds an address in memory, and this one is written to the records of a cache
        raise SourceError("not an image of a known format") from error
    except Exception as error:
        # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for broken files
        raise SourceError(f"not a whole image: {error}") from error


def _to_eight_bits(image: Image.Image, sixteen: bool) -> Image.Image:
    """Scale 16-bit greyscale to 8 bits; Pillow's own convert would clip everything above 255 to white.

    sixteen: the file says 16 bits; otherwise (TIFF's 32-bit and float modes) the values decide.
    """
    values: npt.NDArray[np.float64] = np.asarray(image, dtype=np.float64)
    if sixteen or bool((values > 255).any()):
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
