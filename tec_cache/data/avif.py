"""An AVIF file without its metadata."""

from __future__ import annotations

import re

_METADATA_ITEM = re.compile(rb"(infe[\x02\x03].{3}(?:.{2}|.{4}).{2})(?:Exif|mime)", re.DOTALL)


def without_metadata(data: bytes) -> bytes:
    """Return an AVIF file in which no item is called EXIF or XMP, so that none that is broken is read.

    Its orientation is a property of the picture (HEIF: EXIF's is to be passed over), which Pillow gives as EXIF.
    Other files are returned as they are.
    """
    if data[4:8] != b"ftyp":
        return data
    return _METADATA_ITEM.sub(rb"\1free", data)
