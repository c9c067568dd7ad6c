#!/usr/bin/env python3
"""Make the golden cache of the current format version. Run once per version; what it made is never made again.

    python -m tests.make_golden_cache tests/data/golden_cache_v3

The cache holds two target sets of a tiny random base over 40 synthetic photos in two views: `exact`, and `coded` with
the transform codec. Beside it lie `pack`, the same as a pack of one view, and `expected.npz`, which keeps what its
decoder gave: later programs must give the same. One photo is broken, and some have no label or a key that must be
escaped.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from pipelines.extract import extract
from pipelines.pack import pack
from tec_cache.cache.opening import open_cache
from tec_cache.config import ExtractConfig
from tests.conftest import encoded, photo, write_tar, write_tiny_base

ROWS = [0, 7, 31, 32, 39]
"""Rows of each unit whose decoded targets are kept: of both blocks."""


def main(out: Path) -> None:
    """Write OUT/cache and OUT/expected.npz."""
    torch.set_num_threads(1)
    out = out.absolute()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # no path of a machine in the cache
        shards, base = write_photos(Path("shards")), write_tiny_base(Path("base"))
        views = {"input": str(shards), "views": 2, "size": 32, "grid": 4, "on_error": "skip"}
        targets = {"base": str(base), "k": "3", "batch_size": 8, "threads": 1, "device": "cpu"}
        for name, quality in (("exact", "exact"), ("coded", "0.05,0.04")):
            extract(ExtractConfig(cache=str(out / "cache"), name=name, quality=quality, **views, **targets))
        pack(str(out / "cache"), str(out / "pack"), num_views=1)
    for name in ("cache", "pack"):
        (out / name / ".lock").unlink()
    np.savez_compressed(out / "expected.npz", **expected(out / "cache"))


def write_photos(folder: Path) -> Path:
    """Write one shard of 41 photos, the last of them broken."""
    keys = ["a/b", "é ü~", "x" * 99, "100%", *(f"p{number:05d}" for number in range(4, 41))]
    members = []
    for number, key in enumerate(keys):
        members.append((f"{key}.jpg", encoded(photo(number)) if number < 40 else b"not a picture"))
        if number % 5:
            members.append((f"{key}.cls", str(number % 4).encode()))
    write_tar(folder / "shard-000000.tar", members)
    return folder


def expected(path: Path) -> dict[str, np.ndarray]:
    """Decode some rows of every unit of every target set."""
    found = {}
    cache = open_cache(path)
    for name in cache.target_names:
        for unit in cache.view_units:
            arrays = cache[name].read_unit(cache[name].record(unit))
            stored = {n: torch.from_numpy(np.ascontiguousarray(values[ROWS])) for n, values in arrays.items()}
            targets = cache[name].decode(stored)
            assert targets.attention is not None
            assert targets.rows is not None
            found |= {
                f"{name}/{unit}/features": targets.features.numpy(),
                f"{name}/{unit}/attention": targets.attention.numpy(),
                f"{name}/{unit}/rows": targets.rows.numpy(),
            }
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
