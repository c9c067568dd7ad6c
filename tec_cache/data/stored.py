"""What the reader of a file format gives: pixels as the file stores them, and the metadata that turns them."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

# Where Pillow begins to warn of a decompression bomb (it refuses at twice as many). Checked by hand: turning its
# warning into an error would touch the warning filters of the whole process, and photos are decoded in threads.
MAX_PIXELS = 89_478_485


@dataclass(frozen=True)
class Stored:
    """A decoded file, before it is turned upright and made RGB."""

    image: Image.Image
    exif: bytes = b""
    """EXIF block, with or without its `Exif` header; empty where there is none."""
    xmp: bytes = b""
    notes: tuple[str, ...] = ()
    """What of the file was not understood, and not needed for its pixels."""


def require_size(width: int, height: int) -> None:
    """Raise ValueError for a photo that would take too much memory, before anything is decoded."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too many")
