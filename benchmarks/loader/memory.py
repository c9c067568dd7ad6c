#!/usr/bin/env python3
"""Peak memory of a process that loads batches: from a cache of 1,000 views, and from one of 100,000.

    python -m benchmarks.loader.memory

Photos of 32 pixels and a tiny base keep the caches small, so that what grows with the number of views is not hidden by
large buffers. Each cache is read by a process of its own; its peak is what the system counts.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from safetensors.torch import save_file

from benchmarks.machine import describe
from pipelines.extract import extract
from tec_cache.config import ExtractConfig

MODEL, ARGS = "vit_tiny_patch16_224", {"depth": 1, "img_size": 64, "num_classes": 0}
PER_SHARD = 5000

READ = """
import sys
from tec_cache.cache.opening import open_cache
from tec_cache.loader import Loader
import torch

def peak():
    # not ru_maxrss: it starts at what the parent process had
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

imported = peak()
cache = open_cache(sys.argv[1])
loader = Loader(cache, cache["t"], batch_size=64, pixel_sizes=(cache.size,), workers=2)
for _ in loader.batches(0, int(sys.argv[2])):
    pass
print(imported, peak())
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, nargs=2, default=(1000, 100_000))
    parser.add_argument("--steps", type=int, default=1600, help="of 64 views; more than an epoch of the larger cache")
    args = parser.parse_args()
    print(describe("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder / "base")
        peaks = []
        for count in args.views:
            cache = make_cache(folder / str(count), count, folder / "base")
            run = [sys.executable, "-c", READ, str(cache), str(args.steps)]
            imported, peak = map(int, subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
            peaks.append(peak)
            print(f"{count:9,d} views: {peak / 1e6:7.1f} MB at most, {imported / 1e6:.1f} MB of it after the imports")
    print(f"growth: {peaks[1] / peaks[0] - 1:.1%}")


def write_base(folder: Path) -> None:
    """Write a random model of one block as an export, which `--base FOLDER` takes."""
    folder.mkdir()
    save_file(timm.create_model(MODEL, **ARGS).state_dict(), folder / "model.safetensors")
    look = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": MODEL, "model_args": ARGS, "pretrained_cfg": look}
    (folder / "config.json").write_text(json.dumps(config))


def make_cache(folder: Path, count: int, base: Path) -> Path:
    """Extract photos of random colours with the tiny base."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for first in range(0, count, PER_SHARD):
        with tarfile.open(folder / f"photos-{first // PER_SHARD:03d}.tar", "w") as tar:
            for number in range(first, min(count, first + PER_SHARD)):
                stream = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32)).save(stream, "JPEG")
                info = tarfile.TarInfo(f"photo-{number:08d}.jpg")
                info.size = stream.tell()
                stream.seek(0)
                tar.addfile(info, stream)
    extract(
        ExtractConfig(
            input=str(folder / "photos-*.tar"),
            cache=str(folder / "cache"),
            base=str(base),
            name="t",
            views=1,
            size=32,
            grid=4,
            k="3",
            quality="exact",
            last_layers=1,
            batch_size=256,
        )
    )
    return folder / "cache"


if __name__ == "__main__":
    main()
