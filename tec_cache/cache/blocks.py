"""A unit's targets as one file: Zarr v3 arrays in an uncompressed zip, a chunk for each block of rows.

Zarr itself makes the chunks and the metadata, so any reader of Zarr opens the zip. The training loader needs
neither: the unit's record says where each block lies, and a block is one range, one CRC and one decompression.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tec_cache.cache.frames import most_frame_bytes, unpacked
from tec_cache.cache.layout import BLOCK_ROWS, array_block
from tec_cache.codec import ZSTD_LEVEL, ArraySpec

if TYPE_CHECKING:
    import numpy.typing as npt

CRC_BYTES = 4
"""Zarr's crc32c at the end of each chunk, for other readers."""


def write_zip(
    path: Path,
    arrays: Mapping[str, npt.NDArray[np.generic]],
    specs: Mapping[str, ArraySpec],
    about: Mapping[str, str | int] | None = None,
) -> dict[str, list[list[int]]]:
    """Write arrays (rows first) as one Zarr group in a zip; return array -> [position, bytes, CRC-32] by block.

    about: what a zip that was separated from its cache says of itself, as the group's attribute "tec_cache".

    Standard codec names only (transpose, bytes, blosc, crc32c). The checksum comes after the compressor: zstd
    alone does not notice a flipped bit. The chunks of a block lie one behind the other. The zip holds no times.
    """
    files = _zarr_files(arrays, specs, about or {})
    blocks: dict[str, list[list[int]]] = {name: [] for name in arrays}
    chunks = {array_block(name, number, len(specs[name].shape)): (name, number)
              for number in range(_num_blocks(arrays)) for name in arrays}  # fmt: skip
    order = [*sorted(set(files) - set(chunks)), *chunks]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member in order:
            info = zipfile.ZipInfo(member, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[member])
            if member in chunks:
                name, _ = chunks[member]
                data = files[member]
                position = archive.start_dir - len(data)  # start_dir: the end of what was written so far
                blocks[name].append([position, len(data), zlib.crc32(data)])
    return blocks


def read_block(data: bytes, spec: ArraySpec) -> npt.NDArray[np.generic]:
    """Decode one chunk as `write_zip` stored it, to (BLOCK_ROWS, *shape); its CRC has been checked.

    Raises ValueError for a chunk of any other size, before memory is allocated for it.
    """
    shape = (BLOCK_ROWS, *spec.shape)
    order = spec.order or tuple(range(len(shape)))
    flat = np.frombuffer(unpacked(data[:-CRC_BYTES], block_bytes(spec)), np.dtype(spec.dtype).newbyteorder("<"))
    return flat.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def block_bytes(spec: ArraySpec) -> int:
    """Return the bytes of a block of rows before compression."""
    return BLOCK_ROWS * math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def most_chunk_bytes(spec: ArraySpec) -> int:
    """Return how many bytes a chunk can have as it is stored."""
    return most_frame_bytes(block_bytes(spec)) + CRC_BYTES


def _num_blocks(arrays: Mapping[str, npt.NDArray[np.generic]]) -> int:
    return -(-len(next(iter(arrays.values()))) // BLOCK_ROWS)


def _zarr_files(
    arrays: Mapping[str, npt.NDArray[np.generic]], specs: Mapping[str, ArraySpec], about: Mapping[str, str | int]
) -> dict[str, bytes]:
    """Let Zarr write a group into memory; return its files."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    group = zarr.create_group(store=MemoryStore(files), zarr_format=3, attributes={"tec_cache": dict(about)})
    for name, values in arrays.items():
        spec = specs[name]
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            dimension_names=["view", *spec.dimensions] if spec.dimensions else None,
            chunks=(BLOCK_ROWS, *values.shape[1:]),
            filters=[TransposeCodec(order=spec.order)] if spec.order else [],
            compressors=[
                BloscCodec(
                    cname="zstd",
                    clevel=ZSTD_LEVEL,
                    shuffle=spec.shuffle,
                    typesize=values.dtype.itemsize,
                    blocksize=spec.split,
                ),
                Crc32cCodec(),
            ],
            config={"write_empty_chunks": True},  # so that a missing chunk is never a legal one
        )
        array[...] = values
    return {name: buffer.to_bytes() for name, buffer in files.items()}
