#!/usr/bin/env python3
"""For how long the loader holds the interpreter lock, by thread: on a GPU's machine this is what bounds its threads.

    python -m benchmarks.loader.lock                                ViT-S/16 targets, crops of 224 pixels
    python -m benchmarks.loader.lock --workers 8 --photos 1024

Photos and a base with random weights are made in the run; all epochs after the first read views that were read before,
as a training's do. The consumer does nothing. Needs a C compiler.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.bases import write_base
from benchmarks.interpreter_lock import LockClocks, with_clocks
from benchmarks.machine import describe
from benchmarks.photos import write_photos
from pipelines.extract import extract
from tec_cache.cache.opening import open_cache
from tec_cache.config import ExtractConfig
from tec_cache.loader import Batch, Loader


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="architecture of the base")
    parser.add_argument("--photos", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with_clocks()
    clocks = LockClocks()
    print(describe("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        photos, cache = Path(folder, "photos.tar"), str(Path(folder, "cache"))
        write_photos(photos, args.photos)
        base = write_base(Path(folder, "base"), args.model, {})
        extract(ExtractConfig(input=str(photos), cache=cache, base=base, views=1, name="t", device="cpu"))
        rounds = [held(clocks, cache, args) for _ in range(args.rounds + 1)][1:]  # the first one warms up
    print(
        f"\n{args.workers} workers, batches of {args.batch_size}; milliseconds a view, median of {args.rounds} rounds"
    )
    for name in sorted({name for found in rounds for name in found}):
        print(f"{name:24s} {statistics.median(1000 * found[name] for found in rounds):8.4f}")


def held(clocks: LockClocks, cache: str, args: argparse.Namespace) -> Counter[str]:
    """Return the seconds a view for which each thread holds the lock, and the CPU seconds of the whole process."""
    opened = open_cache(cache)
    loader: Loader[Batch] = Loader(
        opened, opened["t"], batch_size=args.batch_size, pixel_sizes=(opened.size,), workers=args.workers
    )
    per_epoch = loader.steps_per_epoch
    batches = loader.batches(0, (args.epochs + 1) * per_epoch)
    for _ in range(per_epoch):
        next(batches)
    before, cpu = clocks.seconds(), time.process_time()
    views = sum(len(batch) for batch in batches)
    found: Counter[str] = Counter()
    for name, seconds in (clocks.seconds() - before).items():
        found[f"lock: {name}"] = seconds / views  # type: ignore[assignment]
    found["lock: all threads"] = sum(found.values())
    found["CPU"] = (time.process_time() - cpu) / views  # type: ignore[assignment]
    return found


if __name__ == "__main__":
    main()
