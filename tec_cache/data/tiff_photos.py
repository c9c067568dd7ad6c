"""A TIFF's pixels, where they are whole and the file says what black and white are."""

from __future__ import annotations

import io
import zlib

import numpy as np
import simplejpeg
from PIL import Image

from tec_cache.data.jpeg_parts import read_header
from tec_cache.data.stored import Stored, require_size
from tec_cache.data.tiff import ORIENTATION, Directory, read_directory, with_tags
from tec_cache.printable import counted

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS = 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANES = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _FORMAT, _JPEG_TABLES = 322, 323, 324, 325, 339, 347

_PIXELS = frozenset(
    {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANES}
    | {_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _FORMAT, _JPEG_TABLES}
    | {254, 255, 266, 292, 293, 317, 320, 332, 338}  # kind of image, bit order, fax options, predictor, palette, inks
    | {512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532}  # the older JPEG, YCbCr
)
"""Tags on which pixels depend; all others may be broken."""

_FORMAT_NAMES = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex floating-point"}
_DEFLATE, _JPEG = (8, 32946), 7


def read_tiff(data: bytes) -> Stored:
    """Decode the first image of a TIFF. Raises ValueError, or what Pillow raises, where it is not whole."""
    directory = read_directory(data)
    require_size(_number(directory, _WIDTH), _number(directory, _HEIGHT))
    _require_defined_samples(directory)
    _require_all_parts(directory)
    image: Image.Image = Image.open(io.BytesIO(with_tags(directory, _PIXELS)), formats=("TIFF",))
    image.load()
    if image.mode == "F" or image.mode == "I":  # no name of samples that Pillow reads so was left
        raise ValueError(f"its samples are of Pillow's mode {image.mode}, whose black and white are not defined")
    if image.mode.startswith("I;16") and directory.numbers(_COLOURS) == (0,):
        # white is zero, which Pillow heeds at 8 bits only
        image = Image.fromarray((65535 - np.asarray(image)).astype(np.uint16))
    # the directory is an EXIF block too
    return Stored(image, data if ORIENTATION in directory.entries else b"")


def _number(directory: Directory, tag: int, default: int | None = None) -> int:
    """Return the first value of a tag, `default` where it is missing. Raises ValueError."""
    values = directory.numbers(tag, () if default is None else (default,))
    if not values:
        raise ValueError(f"its tag {tag} is missing")
    return values[0]


def _require_defined_samples(directory: Directory) -> None:
    """Raise ValueError unless samples are whole numbers from 0 of at most 16 bits: they end where their bits end."""
    bits = max(directory.numbers(_BITS, (1,)), default=1)
    for kind in directory.numbers(_FORMAT, (1,)):
        if bits > 16 or kind in (2, 3, 5, 6):
            name = _FORMAT_NAMES.get(kind, "unknown")
            raise ValueError(f"{bits}-bit {name} samples, whose black and white a TIFF does not define")


def _require_all_parts(directory: Directory) -> None:
    """Raise ValueError where strips or tiles are missing, lie outside the file, or are damaged as far as can be told.

    Uncompressed samples, and those of codings without checksums (LZW, PackBits), may hold anything.
    """
    tiled = _TILES in directory.entries
    places = directory.numbers(_TILES if tiled else _STRIPS)
    sizes = directory.numbers(_TILE_BYTES if tiled else _STRIP_BYTES)
    width, height = _number(directory, _WIDTH), _number(directory, _HEIGHT)
    if tiled:
        wide, high = max(1, _number(directory, _TILE_WIDTH)), max(1, _number(directory, _TILE_HEIGHT))
        parts = -(-width // wide) * -(-height // high)
    else:
        parts = -(-height // max(1, min(height, _number(directory, _ROWS, height))))
    if _number(directory, _PLANES, 1) == 2:
        parts *= _number(directory, _SAMPLES, 1)
    if len(places) < parts or (sizes and len(sizes) < parts):
        raise ValueError(f"missing: {parts - min(len(places), len(sizes) or parts)} of its {counted(parts, 'part')}")
    compression = _number(directory, _COMPRESSION, 1)
    for place, size in zip(places[:parts], sizes[:parts] or (1,) * parts, strict=True):
        if place == 0 or size == 0:
            raise ValueError("a part of it was never written")
        if compression != 1 and place + size > len(directory.data):
            raise ValueError("it is cut")
        _check_part(directory, compression, directory.data[place : place + size])


def _check_part(directory: Directory, compression: int, part: bytes) -> None:
    """Raise ValueError for a strip or tile whose damage libtiff does not report, or that is larger than the picture."""
    if compression in _DEFLATE:
        # 4 samples of 16 bits; a tile may be wider and higher than the picture
        left = 8 * (_number(directory, _WIDTH) + 4096) * (_number(directory, _HEIGHT) + 4096)
        inflate = zlib.decompressobj()
        try:
            while part and left > 0:
                left -= len(inflate.decompress(part, 1 << 20))
                part = inflate.unconsumed_tail
        except zlib.error as error:
            raise ValueError(f"a part of it is damaged: {error}") from error
    elif compression == _JPEG:
        tables = bytes(directory.numbers(_JPEG_TABLES)) if _JPEG_TABLES in directory.entries else b""
        data = tables[:-2] + part[2:] if tables else part
        header = read_header(data)
        require_size(header.width, header.height)
        simplejpeg.decode_jpeg(data, "RGB")
