"""A PNG without its metadata, its checksums checked.

Pillow leaves the checksums of the pixels unread, shows rows that are missing as black, and refuses a whole picture for
a text that is too long.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from tec_cache.data.stored import Stored, require_size

MAGIC = b"\x89PNG\r\n\x1a\n"

_RAW_PROFILE, _XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"

_MOST_TEXT = 1 << 20
"""Bytes of an inflated text that are looked at."""

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Colour type -> samples of a pixel."""

_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7: left, top and the steps right and down of each pass."""


def read_png(data: bytes) -> Stored:
    """Decode a PNG. Raises ValueError, or what Pillow raises, where its pixels are not whole."""
    exif, xmp, kept, notes = b"", b"", [MAGIC], []
    pixels: list[bytes] = []
    for kind, body, sound in _chunks(data):
        if not kind[0] & 0x20:  # an upper case letter: a chunk that the pixels depend on
            if not sound:
                raise ValueError(f"its chunk {kind.decode('ascii', 'backslashreplace')} is damaged or cut")
            if kind != b"IEND":
                kept.append(_chunk(kind, body))
            if kind == b"IHDR" and len(body) == 13:
                require_size(*struct.unpack(">II", body[:8]))
            if kind == b"IDAT":
                pixels.append(body)
        elif not sound:
            notes.append(f"its chunk {kind.decode('ascii', 'backslashreplace')} is damaged")
        elif kind == b"eXIf":
            exif = body
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            key, text = _text(kind, body)
            exif = exif or (_raw_profile(text) if key == _RAW_PROFILE else b"")
            xmp = xmp or (text if key == _XMP else b"")
    image = Image.open(io.BytesIO(b"".join([*kept, _chunk(b"IEND", b"")])), formats=("PNG",))
    _require_all_rows(kept[1][8:-4], pixels)
    image.load()
    return Stored(image, exif, xmp, tuple(notes))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Yield (kind, body, whether it is whole and its checksum right) of each chunk."""
    at = len(MAGIC)
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + size
        checksum = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        yield kind, data[at + 8 : end], data[end : end + 4] == checksum
        if kind == b"IEND":
            return
        at = end + 4


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def _require_all_rows(header: bytes, pixels: list[bytes]) -> None:
    """Raise ValueError where the compressed data hold fewer rows than the header says."""
    width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    missing = 0
    for left, top, right, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            missing += rows * (1 + (columns * depth * _CHANNELS[colours] + 7) // 8)
    inflate = zlib.decompressobj()
    for part in pixels:
        while part and missing > 0:
            missing -= len(inflate.decompress(part, 1 << 20))
            part = inflate.unconsumed_tail
    if missing > 0 and missing > len(inflate.flush()):
        raise ValueError("its last rows are missing")


def _text(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Return key and text of a text chunk that may hold an orientation; a long one is cut, a broken one empty."""
    key, _, text = body.partition(b"\0")
    if key not in (_RAW_PROFILE, _XMP):
        return key, b""
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]
    elif packed:
        text = text[1:]
    try:
        return key, zlib.decompressobj().decompress(text, _MOST_TEXT) if packed else text
    except zlib.error:
        return key, b""


def _raw_profile(text: bytes) -> bytes:
    """Return the bytes of ImageMagick's way to write EXIF as text: a name, a length, lines of hexadecimal digits."""
    try:
        return bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    except ValueError:
        return b""
