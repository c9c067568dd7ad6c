"""An AVIF file without its metadata."""

from __future__ import annotations

import re

from PIL import features

_METADATA_ITEM = re.compile(rb"(infe(?:\x02.{5}|\x03.{7}).{2})(?:Exif|mime)", re.DOTALL)


def is_avif(data: bytes) -> bool:
    """Say whether a file is AVIF by its first box. Raises ValueError where this Pillow cannot read any."""
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    if data[4:8] != b"ftyp" or not {b"avif", b"avis"} & {brands[at : at + 4] for at in range(0, len(brands), 4)}:
        return False
    if not features.check("avif"):
        raise ValueError("this Pillow was built without AVIF, which the wheels of Pillow 11.3 and later have")
    return True


def without_metadata(data: bytes) -> bytes:
    """Return an AVIF file in which no item is called EXIF or XMP, so that none that is broken is read.

    Its orientation is a property of the picture (HEIF: EXIF's is to be passed over), which Pillow gives as EXIF.
    """
    return _METADATA_ITEM.sub(rb"\1free", data)
