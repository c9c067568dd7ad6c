#!/usr/bin/env python3
"""What a view costs in stage one, beside the base: CPU time against the floor, and time with the interpreter lock.

    python -m benchmarks.images 'photos-*.tar'                 CPU time of a view, all processes together
    python -m benchmarks.images 'photos-*.tar' --lock          and for how long which thread holds the lock

The floor is a bare loop over the photos in memory that calls what cannot be spared: libjpeg-turbo's decoder, Pillow's
crop and bicubic resize, libjpeg-turbo's encoder. Everything else is what stage one adds: reading the shards, checking
that photos are whole, SHA-256 of them, drawing boxes, mirroring, tars, checksums, records, syncing, and what travels
between processes. `extract --views-only` is measured as it is used, into fresh caches, images being worked on in
threads or in processes from the first photo on; "start" is what one process costs before its first photo. The kinds
take turns, round by round.
"""

from __future__ import annotations

import argparse
import glob
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from benchmarks.interpreter_lock import LockClocks, with_clocks
from benchmarks.machine import describe
from pipelines.extract import extract
from tec_cache.cache.pixels import JpegSettings
from tec_cache.config import ExtractConfig
from tec_cache.data import image_pool
from tec_cache.data.image_process import Bytes, ImageProcess
from tec_cache.data.photos import Photo
from tec_cache.data.source import open_source
from tec_cache.data.views import View, ViewPlan, cut_photo
from tec_cache.device import available_cores

PLAN, JPEG = ViewPlan(), JpegSettings()
NEVER = 1 << 60
Photos = list[tuple[str, Photo]]


def main() -> None:
    """Measure and print a table for each number of views."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="pattern of local shards of photos")
    parser.add_argument("--views", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeat", type=int, default=4, help="how many times each shard is read, by other names")
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lock", action="store_true", help="measure the lock, not CPU time")
    args = parser.parse_args()
    if args.lock:
        with_clocks()
    clocks = LockClocks() if args.lock else None
    print(describe("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(args.repeat):
            for path in map(Path, glob.glob(args.data)):
                (folder / f"{number:03d}-{path.name}").symlink_to(path.resolve())
        for views in args.views:
            config = {"input": f"{folder}/*.tar", "views": views, "views_only": True, "workers": args.workers}
            if clocks is not None:
                lock_table(clocks, config, args.rounds)
            else:
                cpu_table(args.data, config, args.rounds)


def cpu_table(data: str, config: dict[str, object], rounds: int) -> None:
    """Print the CPU time of a view: the floor, the work on an image, and all that extract does."""
    photos = [(shard.name, photo) for shard in open_source(data, seed=0).shards for photo in shard.photos()]
    views = int(str(config["views"]))
    boxes = drawn(photos, views)
    kinds: dict[str, Callable[[], float]] = {
        "floor": lambda: in_thread(lambda: floor(photos, boxes)) / (views * len(photos)),
        "image work": lambda: in_thread(lambda: work(photos, views)) / (views * len(photos)),
        "extract, threads": lambda: whole(config, NEVER)[0],
        "extract, processes": lambda: whole(config, 0)[0],
        "start": start,
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, run in kinds.items():
            seconds[kind].append(run())
    print(f"\nCPU of a view; {views} views a photo, {config['workers']} workers, median of {rounds} rounds (range)")
    print("kind                 ms/view        floor's share")
    for kind in list(kinds)[:-1]:
        shares = [one / other for one, other in zip(seconds["floor"], seconds[kind], strict=True)]
        share = f"{statistics.median(shares):6.1%} ({min(shares):.1%} to {max(shares):.1%})"
        print(f"{kind:20s} {1000 * statistics.median(seconds[kind]):7.3f}        {share}")
    print(f"start of a process: {statistics.median(seconds['start']):.2f} s, not in the line above", flush=True)


def lock_table(clocks: LockClocks, config: dict[str, object], rounds: int) -> None:
    """Print for how long the lock is held for a view, by thread, and how many views a second that leaves."""
    for title, first in (("threads", NEVER), ("processes", 0)):
        held: Counter[str] = Counter()
        views = 0
        for _ in range(rounds):
            before = clocks.seconds()
            views += whole(config, first)[1]
            held.update(clocks.seconds() - before)
        total = sum(held.values())
        print(f"\nlock held, image work in {title}; {config['views']} views a photo, {config['workers']} workers")
        for thread, seconds in held.most_common():
            if seconds > 0.01 * total:
                print(f"{thread:20s} {1000 * seconds / views:7.4f} ms/view")
        print(f"{'all':20s} {1000 * total / views:7.4f} ms/view: at most {views / total:,.0f} views/s", flush=True)


def whole(config: dict[str, object], images_in_threads: int) -> tuple[float, int]:
    """Extract views into a fresh cache; return the CPU seconds per view, without starts of processes, and the views."""
    image_pool.IMAGES_IN_THREADS = images_in_threads
    started: list[ImageProcess] = []
    image_pool.ImageProcess = listening(started)  # type: ignore[misc, assignment]
    with tempfile.TemporaryDirectory() as name:
        begin = os.times()
        summary = extract(ExtractConfig(cache=name, **config))  # type: ignore[arg-type]
        end = os.times()
    spent = sum(end[:4]) - sum(begin[:4]) - len(started) * (start() if started else 0.0)
    return spent / summary.views_made, summary.views_made


def listening(started: list[ImageProcess]) -> type[ImageProcess]:
    """Return a kind of process that is waited for, so that no image is worked on in a thread meanwhile."""

    class Listening(ImageProcess):
        def __init__(self, pixels: Bytes) -> None:
            super().__init__(pixels)
            while not self.ready:
                time.sleep(0.01)
            started.append(self)

    return Listening


def start() -> float:
    """Return the CPU seconds that a process takes to start and to leave."""
    begin = os.times()
    pixels = Bytes()
    process = ImageProcess(pixels)
    while not process.ready:
        time.sleep(0.01)
    process.leave()
    process.wait()
    pixels.close()
    end = os.times()
    return end.children_user + end.children_system - begin.children_user - begin.children_system


def drawn(photos: Photos, views: int) -> list[list[View]]:
    """Return the boxes of all views."""
    sizes = [simplejpeg.decode_jpeg_header(photo.data)[:2] for _, photo in photos]
    return [
        [PLAN.view(shard, photo.key, number, width, height) for number in range(views)]
        for (shard, photo), (height, width) in zip(photos, sizes, strict=True)
    ]


def floor(photos: Photos, boxes: list[list[View]]) -> None:
    """Decode, crop, resize and encode, and nothing else."""
    size = (PLAN.size, PLAN.size)
    for (_, photo), views in zip(photos, boxes, strict=True):
        image = Image.fromarray(simplejpeg.decode_jpeg(photo.data, "RGB"))
        for left, top, width, height, _ in views:
            crop = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
            simplejpeg.encode_jpeg(np.asarray(crop), JPEG.quality, "RGB", JPEG.subsampling, False)


def work(photos: Photos, views: int) -> None:
    """Do all that is done to an image."""
    for shard, photo in photos:
        cut_photo(photo, shard, PLAN, range(views), JPEG)


def in_thread(do: Callable[[], None]) -> float:
    """Return the CPU seconds of this thread."""
    begin = time.thread_time()
    do()
    return time.thread_time() - begin


if __name__ == "__main__":
    main()
