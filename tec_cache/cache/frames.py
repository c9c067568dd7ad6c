"""Blosc frames: what one claims of itself is compared with what is expected before anything is allocated for it."""

from __future__ import annotations

from typing import NamedTuple

HEADER_BYTES = 16
"""Of a frame; one that does not compress is that much longer than its content."""


class FrameHeader(NamedTuple):
    """What the first bytes of a frame say."""

    content: int
    """Bytes after decompression."""
    split: int
    """Bytes that are compressed alone."""
    length: int
    """Bytes of the frame itself."""


def frame_header(data: bytes) -> FrameHeader:
    """Read a frame's header. Raises ValueError where there is none."""
    if len(data) < HEADER_BYTES:
        raise ValueError(f"{len(data)} bytes are no Blosc frame")
    return FrameHeader(*(int.from_bytes(data[at : at + 4], "little") for at in (4, 8, 12)))


def unpacked(frame: bytes, num_bytes: int) -> bytes:
    """Decompress a frame that holds `num_bytes` bytes. Raises ValueError for any other, before decompressing it."""
    from numcodecs import blosc

    header = frame_header(frame)
    if header.content != num_bytes or not 0 < header.split <= num_bytes:
        raise ValueError(f"a Blosc frame of {header.content:,} bytes, in pieces of {header.split:,}: not {num_bytes:,}")
    if header.length != len(frame):
        raise ValueError(f"a Blosc frame of {len(frame):,} bytes that claims {header.length:,}")
    try:
        data: bytes = blosc.decompress(frame)
    except RuntimeError as error:
        raise ValueError(f"a damaged Blosc frame: {error}") from error
    return data


def most_frame_bytes(num_bytes: int) -> int:
    """Return how long a frame of `num_bytes` bytes can be."""
    return num_bytes + HEADER_BYTES
