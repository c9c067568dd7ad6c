#!/usr/bin/env python3
"""How near stage one comes to its limits: views per second of `extract`, of its image work alone, of its base alone.

    python -m benchmarks.extract 'photos-*.tar'                  a ViT-B/16, and a base so small that photos decide
    python -m benchmarks.extract 'photos-*.tar' --weights FILE   with weights of the ViT-B that are not random
    python -m benchmarks.extract 'photos-*.tar' --model vit_small_patch16_224 --photos 64

Image work: decoding a photo, cropping, JPEG of each view, and decoding the stored crops, in a pool of all cores, each
with a process of its own, photos in memory. Base: forward and normalization, pixels in memory. Coding: encoding the
targets and compressing them. The kinds run in turn, round by round, so that a drift of the machine meets all of them.
The codec is fitted beforehand; the seconds of `extract` are those of making views and targets, from the first photo to
the last record, without loading the base. What of it is not the base's is in benchmarks.images.

On a GPU the slower one of image work and base is the limit. On a CPU both share the cores: at best their times add
up, and that sum is the limit; coding, which comes on top, is part of what keeps `extract` from it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors.torch import save_file

from benchmarks.bases import write_base
from benchmarks.machine import describe
from pipelines.extract import extract
from pipelines.extraction.base_batches import Places, start_batch, targets_of
from pipelines.extraction.make_views import PHOTOS_TOGETHER
from pipelines.extraction.prepare_targets import TargetJob, prepare_targets
from pipelines.extraction.prepare_views import ViewJob, prepare_cache
from pipelines.extraction.tally import bottleneck_text
from tec_cache.cache.blocks import write_zip
from tec_cache.cache.lock import CacheLock
from tec_cache.cache.reader import Cache
from tec_cache.codec import Codec
from tec_cache.config import ExtractConfig
from tec_cache.data import image_pool
from tec_cache.data.image_pool import ImagePool
from tec_cache.data.image_work import Cutting
from tec_cache.data.photos import Photo
from tec_cache.device import available_cores, resolve_compute
from tec_cache.distributed import Ranks
from tec_cache.store import open_store

TINY = {"embed_dim": 48, "depth": 1, "num_heads": 3, "patch_size": 32}
"""Of the base of the decode-bound case: it and its targets take a few percent of the photos' time."""
T = TypeVar("T")
KINDS = ("image work", "base", "coding", "extract")


@dataclass(frozen=True)
class Case:
    """A prepared extraction: settings, a cache with a fitted codec, and inputs for its parts alone."""

    name: str
    config: ExtractConfig
    fitted: Path
    views: ViewJob
    job: TargetJob
    codec: Codec
    photos: list[tuple[str, Photo]]
    base_views: int
    """Views on which the base alone is timed."""

    @property
    def num_views(self) -> int:
        """Views of all photos."""
        return len(self.photos) * self.views.num_views


def main() -> None:
    """Measure and print one table for each case."""
    if "OMP_WAIT_POLICY" not in os.environ:  # as the command line sets it, before torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shards of photos")
    parser.add_argument("--model", default="vit_base_patch16_224", help="of the base-bound case")
    parser.add_argument("--weights", help="its weight file  [default: random]")
    parser.add_argument("--photos", type=int, default=256, help="of the base-bound case, at most")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--base-views", type=int, default=64, help="views on which the base alone is timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quality", default="default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="where the disk is that is meant; default: a temporary folder")
    args = parser.parse_args()
    print(describe(str(resolve_compute(args.device, "auto").device)))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        torch.manual_seed(0)
        weights = args.weights or write_weights(folder / "base.safetensors", args.model)
        base = {"base": f"timm:{args.model}", "base_weights": weights, "limit": args.photos}
        measure(prepare(f"base-bound: {args.model}", args, base, folder / "large"), args)
        tiny = {"base": write_tiny(folder / "tiny"), "last_layers": 1, "grid": 7}
        measure(prepare("decode-bound: a tiny base", args, tiny, folder / "small"), args)


def write_weights(path: Path, model: str) -> str:
    """Save random weights of a model; return the file."""
    save_file(timm.create_model(model, num_classes=0).state_dict(), path)
    return str(path)


def write_tiny(folder: Path) -> str:
    """Save a very small base in the layout of an export; return the folder."""
    return write_base(folder, "vit_tiny_patch16_224", TINY)


def prepare(name: str, args: argparse.Namespace, base: dict[str, Any], folder: Path) -> Case:
    """Fit the codec, load the base and read the photos."""
    common = {"input": args.data, "views": args.views, "quality": args.quality, "device": args.device, "name": "t"}
    fit = {} if args.quality == "exact" else {"fit_views": 128}
    config = ExtractConfig(cache=str(folder / "fitted"), **fit, **common | base)
    extract(config, fit_only=True)
    store = open_store(config.cache)
    lock, how = CacheLock(None, store.url), {"dry_run": True, "overwrite": False, "ranks": Ranks()}
    cache, views = prepare_cache(config, store, lock=lock, **how)
    job = prepare_targets(config, cache, lock=lock, **how)
    entries = cache.identity["source"]["shards"]
    photos = [
        (shard.name, photo)
        for shard, entry in zip(views.shards, entries, strict=True)
        for place, photo in enumerate(shard.photos())
        if entry.get("take") is None or place < entry["take"]
    ]
    codec = Cache(store, cache.manifest)["t"].codec
    return Case(name, config, Path(config.cache), views, job, codec, photos, min(args.base_views, len(photos)))


def measure(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Time all kinds in turn; print and return their medians, in seconds per view."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    slowest = ""
    image_pool.IMAGES_IN_THREADS = 0
    with ImagePool(available_cores()) as pool:
        work = parts(case, pool)
        for kind in ("image work", "base", "coding"):
            work[kind]()  # loads what it needs
        for _ in range(args.rounds):
            for kind, run in work.items():
                seconds[kind].append(run())
            spent, slowest = real(case)
            seconds["extract"].append(spent)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    show(case, medians, args.rounds, slowest)
    return medians


def parts(case: Case, pool: ImagePool) -> dict[str, Callable[[], float]]:
    """Return functions that do one part of the work and return its seconds per view."""
    size, step = case.job.base.input_size, case.job.batch_size
    numbers = tuple(range(case.views.num_views))
    tasks = [
        (Cutting(shard, case.views.plan, numbers, case.views.jpeg), [photo for _, photo in together])
        for shard, photos in groupby(case.photos, key=lambda named: named[0])
        for together in batched(photos, PHOTOS_TOGETHER)
    ]
    first = [seen.cut.jpegs[0] for task in tasks for seen in pool.cut(*task).result()][: case.base_views]
    places = Places(case.job, pool, -(-len(first) // step))
    batches = [start_batch(first[i : i + step], [], "", places) for i in range(0, len(first), step)]
    pixels = [batch.decoded().clone() for batch in batches]

    def image_work() -> float:
        """Cut all views, and decode them as soon as they are there."""
        room = pool.pixels(PHOTOS_TOGETHER * len(numbers) * len(tasks), size)

        def run() -> None:
            decoding, at = [], 0
            for every in [pool.cut(*task) for task in tasks]:
                jpegs = [jpeg for seen in every.result() for jpeg in seen.cut.jpegs]
                decoding.append(pool.decode(jpegs, room, at))
                at += len(jpegs)
            for future in decoding:
                future.result()

        return timed(run) / case.num_views

    def base() -> float:
        return timed(lambda: [targets_of(case.job, part) for part in pixels]) / len(first)

    targets = [targets_of(case.job, part) for part in pixels]

    def coding() -> float:
        return timed(lambda: [code(case, one) for one in targets]) / len(first)

    return {"image work": image_work, "base": base, "coding": coding}


def batched(items: Iterable[T], count: int) -> Iterator[list[T]]:
    """Yield lists of `count` items, the last one of what is left."""
    iterator = iter(items)
    while part := list(islice(iterator, count)):
        yield part


def code(case: Case, targets: Any) -> None:
    """Encode and compress a batch, as a unit of its own."""
    with tempfile.NamedTemporaryFile(suffix=".zip") as file:
        spec = case.job.spec
        write_zip(Path(file.name), case.codec.encode(targets, spec), case.codec.arrays(spec))


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of some work, the device's included."""
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def real(case: Case) -> tuple[float, str]:
    """Extract into a fresh cache; return the seconds per view, and what it says the bottleneck is."""
    cache = case.fitted.with_name("real")
    shutil.copytree(case.fitted, cache)
    summary = extract(replace(case.config, cache=str(cache)))
    if summary.targets_made != case.num_views:
        raise SystemExit(f"{summary.targets_made} targets of {case.num_views} views: the photos must be whole")
    shutil.rmtree(cache)
    return summary.making_seconds / summary.targets_made, bottleneck_text(summary.busy)


def show(case: Case, seconds: dict[str, float], rounds: int, slowest: str) -> None:
    """Print the table of one case."""
    views = f"{len(case.photos)} photos, {case.views.num_views} views"
    print(f"\n{case.name}; {views}, quality {case.config.quality}, median of {rounds} rounds")
    print("kind          ms/view    views/s   extract reaches")
    limit = max(seconds["image work"], seconds["base"])
    both = seconds["image work"] + seconds["base"]
    for kind in KINDS:
        reached = f"{seconds[kind] / seconds['extract']:10.1%}" if kind in ("image work", "base") else ""
        print(f"{kind:12s} {1000 * seconds[kind]:8.2f} {1 / seconds[kind]:10.1f} {reached}".rstrip())
    print(f"of the binding single limit ({1 / limit:,.1f} views/s): {limit / seconds['extract']:.1%}")
    if case.job.compute.device.type == "cpu":
        print(f"of image work and base on the same cores ({1 / both:,.1f} views/s): {both / seconds['extract']:.1%}")
    print(f"extract says: {slowest}", flush=True)


if __name__ == "__main__":
    main()
