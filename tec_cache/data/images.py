"""From the bytes of any photo to an upright RGB array."""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from tec_cache.errors import SourceError

# Wide enough for a photo, small enough to stop a decompression bomb before it is decoded.
MAX_PIXELS = 200_000_000


def decode_photo(data: bytes) -> Image.Image:
    """Decode a photo to an upright 8-bit RGB image.

    EXIF orientation is applied; greyscale, palette, CMYK and 16-bit images are converted; alpha is dropped (as
    torchvision's and timm's loaders do). Raises SourceError for anything that is not a whole image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise SourceError(f"{image.width} x {image.height} pixels are too many")
            image.load()
    except SourceError:
        raise
    except Exception as error:
        # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for broken files
        raise SourceError(f"not a whole image: {error}") from error
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit greyscale to 8 bits; Pillow's own convert would clip everything above 255 to white."""
    values: npt.NDArray[np.float64] = np.asarray(image, dtype=np.float64)
    if values.max(initial=0) > 255:
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
