#!/usr/bin/env python3
"""Views per second and core: stored crops with their targets, against decoding photos, and against other stores.

    python -m benchmarks.loader 'photos-*.tar' WEIGHTS --base timm:vit_small_patch14_dinov2.lvd142m

The process is bound to one core and hands every batch to a consumer that does nothing. Ours: crops decoded to uint8 and
codes decompressed, as the training gets them. The usual way: WebDataset of the photos, PIL, RandomResizedCrop and
flip, no targets at all. Beside it, with the same crops: WebDataset without targets, WebDataset with float16 targets as
`.npy` members, and loose `.jpg` and `.npy` files; these decode crops with the same JPEG library as ours. All stop at
batches of uint8. Warm: files in the page cache. Cold: the files' pages are dropped before each pass. The kinds take
turns, in several rounds; ratios are of medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.loader.parts import decoding_seconds, mixing, parts_of_a_view
from benchmarks.loader.rivals import Rivals
from benchmarks.machine import describe
from pipelines.extract import extract
from tec_cache.cache.opening import open_cache
from tec_cache.config import ExtractConfig
from tec_cache.loader import Loader

BATCH = 64


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="shards of photos")
    parser.add_argument("weights", help="weight file of the base")
    parser.add_argument("--base", default="timm:vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each kind in each round")
    parser.add_argument("--cache", help="keep the cache here, and use the one that is there")
    args = parser.parse_args()
    print(describe("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        cache = args.cache or f"{folder}/cache"
        extract(
            ExtractConfig(
                input=args.photos, cache=cache, base=args.base, base_weights=args.weights, views=args.views, name="t"
            )
        )
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        rivals = Rivals(args.photos, cache, Path(folder), BATCH)
        kinds: dict[str, Callable[[], Iterator[int]]] = {
            "ours: crops and targets, quality default": lambda: ours(cache),
            "photos: WebDataset, PIL, RandomResizedCrop, no targets": rivals.photos,
            "the same crops: WebDataset, no targets": rivals.crops,
            "the same crops: WebDataset, fp16 targets as .npy": rivals.crops_and_arrays,
            "the same crops: files .jpg and .npy fp16": rivals.files,
        }
        files = [path for path in [*Path(cache).rglob("*"), *Path(folder).rglob("*")] if path.is_file()]
        files += [Path(path) for path in rivals.photo_files]
        for title, before in (("warm", lambda: None), ("cold", lambda: forget(files))):
            rates = compare(kinds, args.rounds, args.seconds, before)
            first = statistics.median(next(iter(rates.values())))
            print(f"\n{title:56s} views/s   ours is faster by   lowest, highest round")
            for name, found in rates.items():
                median = statistics.median(found)
                print(f"{name:56s} {median:7,.0f}   {first / median:8.2f}   {min(found):18,.0f}, {max(found):,.0f}")
        print("\nCPU milliseconds of one view in the loader")
        for name, seconds in parts_of_a_view(lambda: ours(cache)).items():
            print(f"  {name:50s} {1000 * seconds:7.3f}")
        opened = open_cache(cache)
        print(
            f"  {'(on the device, here the same core) decoding codes':50s} {1000 * decoding_seconds(opened['t']):7.3f}"
        )
    print("\nmean share of a batch that its most frequent unit has, 1,251 units of 1,024 views")
    print(mixing())


def ours(cache: str) -> Iterator[int]:
    """Yield the number of views of each batch; one pass is all views of the cache, an epoch for each."""
    opened = open_cache(cache)
    loader = Loader(opened, opened["t"], batch_size=BATCH, pixel_sizes=(opened.size,), workers=1)
    for batch in loader.batches(0, loader.num_views * loader.steps_per_epoch):
        yield len(batch)


def compare(
    kinds: dict[str, Callable[[], Iterator[int]]], rounds: int, seconds: float, before: Callable[[], object]
) -> dict[str, list[float]]:
    """Return the views per second of each kind in each round; `before` runs before each pass and is not timed."""
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name, batches in kinds.items():
            views, spent = 0, 0.0
            while spent < seconds:
                before()
                begin = time.perf_counter()
                views += sum(batches())
                spent += time.perf_counter() - begin
            if turn:  # the first round warms up
                rates[name].append(views / spent)
    return rates


def forget(files: list[Path]) -> None:
    """Drop the files' pages from memory, so that reading them asks the disk."""
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
