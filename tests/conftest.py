"""Shared fixtures: the golden case, tiny models, and small sets of synthetic photos."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

GOLDEN = Path(__file__).parent / "data" / "golden_mae_like.npz"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests run side by side under xdist; more threads than cores only slows them down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def photo(seed: int, width: int = 80, height: int = 60, mode: str = "RGB") -> Image.Image:
    """A smooth random picture: compresses like a photo, and no two are alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: list[int], *, start: int = 0) -> Path:
    """Write shards of labelled synthetic photos: class = number mod 4."""
    number = start
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            members += [
                (f"p{number:05d}.jpg", encoded(photo(number))),
                (f"p{number:05d}.cls", str(number % 4).encode()),
            ]
            number += 1
        write_tar(folder / f"shard-{shard:06d}.tar", members)
    return folder
