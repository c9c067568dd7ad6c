#!/usr/bin/env python3
"""Make the golden cache of the current format version. Run once per version; what it made is never made again.

    python -m tests.make_golden_cache tests/data/golden_cache_v1

The cache holds two target sets of a tiny random base over 40 synthetic photos in two views: `exact`, and `coded` with
the transform codec. Beside it `expected.npz` keeps what its decoder gave: later programs must give the same.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from pipelines.extract import extract
from tec_cache.cache.reader import open_cache
from tec_cache.config import ExtractConfig
from tests.conftest import write_shards, write_tiny_base

ROWS = [0, 7, 31, 32, 39]
"""Rows of each unit whose decoded targets are kept: of both blocks."""


def main(out: Path) -> None:
    """Write OUT/cache and OUT/expected.npz."""
    torch.set_num_threads(1)
    out = out.absolute()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # no path of a machine in the cache
        shards, base = write_shards(Path("shards"), [40]), write_tiny_base(Path("base"))
        views = {"input": str(shards), "views": 2, "size": 32, "grid": 4}
        targets = {"base": str(base), "k": "3", "batch_size": 8, "threads": 1, "device": "cpu"}
        for name, quality in (("exact", "exact"), ("coded", "0.05,0.04")):
            extract(ExtractConfig(cache=str(out / "cache"), name=name, quality=quality, **views, **targets))
    (out / "cache" / ".lock").unlink()
    np.savez_compressed(out / "expected.npz", **expected(out / "cache"))


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
