"""Stored pixels: one JPEG codec and one resizer for the whole project.

The base sees the decoded crop and the student sees the same decoded crop, so both sides decode with the
same function. Pillow's bicubic works in fixed-point arithmetic on 8-bit pixels, so it gives one answer on
every machine and device; torch's and OpenCV's differ from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from tec_cache.errors import ConfigError

RESIZER = "pillow-bicubic"
"""Name of `resize` in the identity of a cache."""

MOST_SIDE = 8192
"""Pixels per side of a stored crop: 200 MB. A JPEG header can claim 65,535, for which 13 GB would be allocated."""

SUBSAMPLINGS = ("444", "422", "420")


@dataclass(frozen=True, kw_only=True)
class JpegSettings:
    """How crops are stored; part of the identity of a cache.

    Quality 90 with 4:2:0 takes about 17 KB per 224-pixel crop, 30 % less than quality 95, and decodes fastest;
    targets are made from the decoded pixels, so the loss is one of augmentation, not of pairing.
    """

    quality: int = 90
    subsampling: str = "420"

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"JPEG quality {self.quality}", todo="give --jpeg-quality from 1 to 100")
        if self.subsampling not in SUBSAMPLINGS:
            raise ConfigError(
                f"JPEG subsampling {self.subsampling!r}",
                todo=f"choose one of: {', '.join(SUBSAMPLINGS)}",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def encode_crop(pixels: npt.NDArray[np.uint8], settings: JpegSettings) -> bytes:
    """Encode a crop (S, S, 3) uint8 RGB as JPEG; the same pixels give the same bytes."""
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), settings.quality, "RGB", settings.subsampling, False
    )
    return data


def most_crop_bytes(size: int) -> int:
    """Return how many bytes the JPEG of a crop can have: noise at quality 100 takes no more than twice its pixels."""
    return 4 * 3 * size * size + 65_536


def decode_crop(data: bytes, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
    """Decode a stored crop to (S, S, 3) uint8 RGB, into `out` where that is given.

    Raises ValueError for damaged data, for a crop of another size than `out`, and for one of more than MOST_SIDE
    pixels per side, before memory is allocated for it.
    """
    if out is None and max(simplejpeg.decode_jpeg_header(data)[:2]) > MOST_SIDE:
        raise ValueError(f"a crop of more than {MOST_SIDE:,} pixels per side")
    pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    if out is not None and pixels.shape != out.shape:
        raise ValueError(f"a crop of {pixels.shape} in the place of {out.shape}")
    return pixels


def decode_resized(data: bytes, out: npt.NDArray[np.uint8]) -> None:
    """Decode a stored crop to `out`, (S, S, 3) uint8 RGB, resized where it has another size.

    Raises ValueError for damaged data and for a crop of more than MOST_SIDE pixels per side.
    """
    if tuple(simplejpeg.decode_jpeg_header(data)[:2]) == out.shape[:2]:
        decode_crop(data, out)
    else:
        out[...] = resize(decode_crop(data), out.shape[0])


def resize(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Resize (h, w, 3) uint8 to (size, size, 3) uint8 with Pillow's antialiased bicubic."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(resized(Image.fromarray(pixels), size))


def resized(image: Image.Image, size: int) -> Image.Image:
    """Resize an image to (size, size) with Pillow's antialiased bicubic."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
