"""From the bytes of a mask to the class of each pixel. A mask is a PNG: other formats change colours."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from tec_cache.data import png
from tec_cache.errors import SourceError

_GREY = 0
"""Colour type of a PNG's header."""


def decode_mask(data: bytes) -> npt.NDArray[np.int32]:
    """Decode a mask to the values of its pixels, (H, W) int32.

    Greyscale of any depth and palettes give the stored numbers; RGB gives R + 256 G, the code of ImageNet-S. Raises
    SourceError for anything else: a mask of colours needs its key, which no file holds.
    """
    if not data.startswith(png.MAGIC):
        raise SourceError("its mask is no PNG")
    try:
        image = png.read_png(data).image
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others for broken files
        raise SourceError(f"its mask is not a whole PNG: {error}") from error
    values: npt.NDArray[np.int32] = np.asarray(image).astype(np.int32)
    depth, colours = data[24], data[25]
    if image.mode == "RGB":
        if depth == 16:
            raise SourceError("its mask has 16 bits for each colour: neither class numbers nor ImageNet-S's code")
        if values[..., 2].any():
            raise SourceError("its mask has blue in it: neither class numbers nor ImageNet-S's code, R + 256 G")
        return values[..., 0] + 256 * values[..., 1]
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise SourceError(f"its mask is of Pillow's mode {image.mode}, which is neither grey, a palette nor RGB")
    if colours == _GREY and depth in (2, 4):
        return values // (255 // (2**depth - 1))  # Pillow spreads such values over 0 to 255
    return values


def encode_mask(values: npt.NDArray[np.integer]) -> bytes:
    """Return a mask as a PNG that `decode_mask` reads: 8-bit grey, or ImageNet-S's code where a value is above 255."""
    if values.max(initial=0) < 256:
        image = Image.fromarray(values.astype(np.uint8))
    else:
        parts = (values % 256, values // 256, np.zeros_like(values))
        image = Image.fromarray(np.stack(parts, axis=-1).astype(np.uint8))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
