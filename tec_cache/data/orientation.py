"""How a stored picture is turned upright: the orientation in its EXIF or XMP block, and nothing else of them.

Pillow reads an EXIF block whole and raises a dozen kinds of errors where any field of it is broken. One number is
needed here; a block from which it cannot be told leaves the photo as it is stored.
"""

from __future__ import annotations

import re

from PIL import Image

from tec_cache.data.tiff import ORIENTATION, read_directory

_EXIF_HEADER = b"Exif\0\0"
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*(\d{1,5})")

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image, exif: bytes, xmp: bytes = b"") -> tuple[Image.Image, str]:
    """Turn a stored picture upright; also return what kept it from being turned, or an empty string.

    EXIF comes first; XMP counts where EXIF names no orientation, as in Pillow.
    """
    note, number = "", None
    if exif:
        try:
            number = exif_orientation(exif)
        except ValueError as error:
            note = f"EXIF: {error}; left as it is stored"
    if number is None and not note and (match := _XMP_ORIENTATION.search(xmp)):
        number = int(match[1])
    if number is not None and number > 8:
        note = f"orientation {number} means nothing; left as it is stored"
    return (image.transpose(_TURN[number]) if number in _TURN else image), note


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation that an EXIF block names, None where it names none.

    Raises ValueError where the block, or its entry, cannot be understood.
    """
    while exif.startswith(_EXIF_HEADER):  # some editors write it twice
        exif = exif[len(_EXIF_HEADER) :]
    directory = read_directory(exif)
    entries = directory.entries.get(ORIENTATION)
    if entries is None:
        if directory.cut:
            raise ValueError("its directory is cut")
        return None
    values = directory.numbers(ORIENTATION)
    if len(values) != 1 or len(set(entries)) != 1:
        raise ValueError("more than one orientation")
    return values[0]
