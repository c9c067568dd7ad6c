"""The codes of one view as one member of a tar: a pack's samples stand alone.

A member `KEY-vVV.NAME.tec` is the bytes "tec" and 3, the version of the format; the CRC-32 of the JPEG (4 bytes,
little-endian); then for each array of the target set NAME, in the order of `pack.json`: a Blosc frame (zstd), and the
CRC-32 of that frame (4 bytes, little-endian). A frame says its own length in its bytes 12 to 15. To read one without
this project:

    for name, dtype, shape in json.load(open("pack.json"))["body"]["identity"]["targets"][NAME]["arrays"]:
        end = start + int.from_bytes(member[start + 12 : start + 16], "little")  # start = 8 before the first
        assert zlib.crc32(member[start:end]) == int.from_bytes(member[end : end + 4], "little")
        values = np.frombuffer(numcodecs.blosc.decompress(member[start:end]), dtype, math.prod(shape)).reshape(shape)
        start = end + 4

A view by itself compresses less well than a cache's block of 32, in which each code lies beside those of the same
coefficient: 14,679 bytes against 14,015 (ViT-S/14, quality default, 192 views of ImageNet photos).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tec_cache.cache.frames import HEADER_BYTES, frame_header, most_frame_bytes, unpacked
from tec_cache.cache.identity import canonical_json
from tec_cache.cache.sealed import FORMAT
from tec_cache.codec import ZSTD_LEVEL, ArraySpec

if TYPE_CHECKING:
    import numpy.typing as npt

    Arrays = Mapping[str, npt.NDArray[np.generic]]

MAGIC = b"tec" + bytes([FORMAT])
CRC_BYTES = 4
EIGHT = 8
"""Blosc shuffles bits of whole eights of numbers and leaves the rest of a block as it is: frames are padded."""
SPLIT = 32_768
"""Bytes with a table of their own: the codes fall along a view. The whole view at once takes 2 % more."""


def write_member(arrays: Arrays, specs: Mapping[str, ArraySpec], jpeg_crc32: int) -> bytes:
    """Return the member of one view; arrays: name -> its row, of the shape and dtype of `specs`."""
    parts = [MAGIC, _crc_bytes(jpeg_crc32)]
    for name, spec in specs.items():
        frame = _frame(arrays[name], spec)
        parts += [frame, _crc_bytes(zlib.crc32(frame))]
    return b"".join(parts)


def read_members(
    members: Sequence[bytes], specs: Mapping[str, ArraySpec], *, magic: bytes = MAGIC
) -> dict[str, npt.NDArray[np.generic]]:
    """Decode members to name -> (rows, *shape); the CRC of each whole member has been checked.

    magic: with which each begins; nothing in format version 1. Raises ValueError for a member that is not these arrays,
    before memory is allocated for what it claims.
    """
    arrays = {name: np.empty((len(members), *spec.shape), spec.dtype) for name, spec in specs.items()}
    for row, member in enumerate(members):
        if not member.startswith(magic):
            raise ValueError(f"codes that begin with {member[: len(magic)]!r}, and not with {magic!r}")
        start = len(magic) + CRC_BYTES
        for name, spec in specs.items():
            end = start + frame_header(member[start : start + HEADER_BYTES]).length
            dtype = np.dtype(spec.dtype).newbyteorder("<")
            values = np.frombuffer(unpacked(member[start:end], _padded(spec)), dtype, math.prod(spec.shape))
            arrays[name][row] = values.reshape(spec.shape)
            start = end + CRC_BYTES
        if start != len(member):
            raise ValueError(f"codes of {len(member):,} bytes, of which {start:,} are arrays")
    return arrays


def most_member_bytes(specs: Mapping[str, ArraySpec]) -> int:
    """Return how many bytes the member of one view can have."""
    return len(MAGIC) + CRC_BYTES + sum(most_frame_bytes(_padded(spec)) + CRC_BYTES for spec in specs.values())


def hash_arrays(arrays: Arrays) -> str:
    """Return the SHA-256 of arrays: their names, dtypes and shapes as canonical JSON, then their values by name."""
    names = sorted(arrays)
    digest = hashlib.sha256(canonical_json([[name, arrays[name].dtype.name, arrays[name].shape] for name in names]))
    for name in names:
        values = arrays[name]
        digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def arrays_json(specs: Mapping[str, ArraySpec]) -> list[list[object]]:
    """Return [name, numpy dtype, shape of a view] of each array in the order of the frames."""
    return [[name, np.dtype(spec.dtype).newbyteorder("<").str, list(spec.shape)] for name, spec in specs.items()]


def _padded(spec: ArraySpec) -> int:
    """Return the bytes of a view's array as it is compressed."""
    return -(-math.prod(spec.shape) // EIGHT) * EIGHT * np.dtype(spec.dtype).itemsize


def _frame(values: npt.NDArray[np.generic], spec: ArraySpec) -> bytes:
    from numcodecs import Blosc

    padded = np.zeros(-(-values.size // EIGHT) * EIGHT, np.dtype(spec.dtype).newbyteorder("<"))
    padded[: values.size] = values.reshape(-1)
    shuffles = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
    return bytes(Blosc("zstd", ZSTD_LEVEL, shuffles[spec.shuffle], SPLIT).encode(padded))


def _crc_bytes(crc32: int) -> bytes:
    return crc32.to_bytes(CRC_BYTES, "little")
