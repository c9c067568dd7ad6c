"""Photos that are made, where none from outside are at hand: colourful, no two alike, as large as ImageNet's."""

from __future__ import annotations

import io
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

WIDTH, HEIGHT = 500, 375
"""Of ImageNet's photos, by far the most frequent; a JPEG of quality 95 of these pictures has about 100 KB, as there."""
PICTURES = 16
"""Pictures that are computed; the others are these, shifted, mirrored, and with other colours."""
OCTAVES = (4, 8, 16, 32, 64, 128, 256)


def write_photos(path: Path, count: int, *, start: int = 0, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Write a tar of photos number `start` and on, each with a class below 10."""
    with tarfile.open(path, "w") as tar:
        for number in range(start, start + count):
            _add(tar, f"p{number:06d}.jpg", _jpeg(number, width, height))
            _add(tar, f"p{number:06d}.cls", str(number % 10).encode())


def _jpeg(number: int, width: int, height: int) -> bytes:
    rng = np.random.default_rng(number)
    pixels = _picture(number % PICTURES, width, height)
    pixels = np.roll(pixels, (int(rng.integers(height)), int(rng.integers(width))), axis=(0, 1))
    pixels = pixels[:, :: 1 if rng.integers(2) else -1, rng.permutation(3)]
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


@cache
def _picture(number: int, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Noise in octaves, each weaker than the coarser one, so that a JPEG takes as many bytes as of a photo."""
    rng = np.random.default_rng(1_000_000 + number)
    total = np.zeros((height, width, 3))
    for step, cells in enumerate(OCTAVES):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) - 127.5
        total += fine * 0.8 * 0.72**step
    return np.clip(total + 127.5, 0, 255).astype(np.uint8)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
