#!/usr/bin/env python3
"""What several target sets cost in one training: seconds of a step, the loader's views per second, bytes, memory.

    python -m benchmarks.sets PHOTOS WEIGHTS --base timm:vit_small_patch14_dinov2.lvd142m --student-arg patch_size=14
    python -m benchmarks.sets                                    (made photos, a ViT-S with random weights)

All sets come from one base, so that they are equally large; each is a set of its own to the program. A step is timed in
stretches that take turns, each count of sets in each round, and ratios are within a round. The loader is bound to one
core and hands its batches to nobody. Memory: the highest resident size of a process that trains some steps, or loads
some batches.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import write_base
from benchmarks.machine import describe
from benchmarks.photos import write_photos
from benchmarks.step.__main__ import spread
from benchmarks.step.kinds import Kind, Setting, kind, measure
from pipelines.extract import extract
from tec_cache.cache.opening import open_cache
from tec_cache.config import ExtractConfig
from tec_cache.flops import student_macs
from tec_cache.loader import Loader
from tec_cache.student.masking import num_visible_patches

BATCH = 64
"""Views of a batch of the loader alone."""


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="?", help="shards of photos; made ones by default")
    parser.add_argument("weights", nargs="?", help="weight file of the base; random ones by default")
    parser.add_argument("--base", default="timm:vit_small_patch16_224")
    parser.add_argument("--student", default="vit_base_patch16_224")
    parser.add_argument("--patch", type=int, default=16, help="of base and student")
    parser.add_argument("--sets", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="timed steps in each stretch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of the loader in each round")
    args = parser.parse_args()
    print(describe("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(args, Path(folder))
        sizes(setting, args.sets)
        steps(setting, args)
        for what, run in (("training", _train), ("loading", _load)):
            peaks = {count: in_process(run, setting, count) for count in args.sets}
            figures = ", ".join(f"{count}: {peak / 1e6:,.0f} MB" for count, peak in peaks.items())
            print(f"highest resident memory of a process that is {what}, by sets: {figures}")
        loading(setting, args)


def prepare(args: argparse.Namespace, folder: Path) -> Setting:
    """Make a cache of as many equal sets as are wanted at most."""
    photos, cache, grid = args.photos, str(folder / "cache"), 224 // args.patch
    if photos is None:
        photos = str(folder / "photos.tar")
        write_photos(Path(photos), 128)
    base: dict[str, Any] = {"base": args.base, "base_weights": args.weights}
    if args.weights is None:
        base = {"base": write_base(folder / "base", args.base.removeprefix("timm:"), {})}
    views = {"input": photos, "views": 1, "grid": grid}
    for number in range(max(args.sets)):
        given = views if number == 0 else {}
        extract(ExtractConfig(cache=cache, name=name_of(number), fit_views=64, **given, **base))
    more = {"student_args": {"patch_size": args.patch}}
    return Setting(cache, folder / "run", args.student, args.batch_size, "cpu", more=more)


def name_of(number: int) -> str:
    """Name a set."""
    return f"set{number}"


def of_sets(setting: Setting, count: int) -> Setting:
    """Return the training of so many sets."""
    names = tuple(name_of(number) for number in range(count))
    return Setting(**vars(setting) | {"more": {**setting.more, "target": names}})


def sizes(setting: Setting, counts: list[int]) -> None:
    """Print the bytes that are read of a view."""
    cache = open_cache(setting.cache)
    views, coded = cache.index, cache[name_of(0)].index
    assert views is not None
    assert coded is not None
    crop, targets = views.num_bytes / views.num_rows, coded.num_bytes / coded.num_rows
    print(f"a view: crop {crop:,.0f} bytes, targets of a set {targets:,.0f}")
    print("read of a view, by sets: " + ", ".join(f"{count}: {crop + count * targets:,.0f}" for count in counts))


def steps(setting: Setting, args: argparse.Namespace) -> None:
    """Print seconds of a step by the number of sets, and the shares that arithmetic gives."""
    kinds: dict[str, Kind] = {str(count): kind(of_sets(setting, count)) for count in args.sets}
    for task, _, _ in kinds.values():
        task.gradients = None  # measured in the first steps, and then so rarely that it costs nothing
    rounds = measure(kinds, args.steps, args.rounds)
    print(f"\n{args.student}, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps")
    print("sets   s/step   against one              multiply-accumulates against one   parameters")
    macs = {}
    for name, (task, _, _) in kinds.items():
        student = task.student
        macs[name] = student_macs(student, num_visible_patches(task.tokens, student.mask_ratio))
        median = statistics.median(found[name] for found in rounds)
        ratio = spread([found[name] / found[str(args.sets[0])] for found in rounds], "{:.3f}")
        size = sum(p.numel() for p in student.parameters())
        print(f"{name:>4s} {median:8.3f}   {ratio:24s} {macs[name] / macs[str(args.sets[0])]:10.3f} {size:35,d}")


def loading(setting: Setting, args: argparse.Namespace) -> None:
    """Print views per second of the loader alone, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    speeds: dict[int, list[float]] = {count: [] for count in args.sets}
    for _ in range(args.rounds):
        for count, found in speeds.items():
            found.append(_views_per_second(setting.cache, count, args.seconds))
    print(f"\nloader, one core, {args.rounds} rounds of {args.seconds:g} s")
    print("sets   views/s   of one")
    for count, found in speeds.items():
        ratio = spread([mine / one for mine, one in zip(found, speeds[args.sets[0]], strict=True)], "{:.3f}")
        print(f"{count:4d} {statistics.median(found):9,.0f}   {ratio}")


def _views_per_second(cache: str, count: int, seconds: float) -> float:
    opened = open_cache(cache)
    sets = [opened[name_of(number)] for number in range(count)]
    loader: Loader[Any] = Loader(opened, sets, batch_size=BATCH, pixel_sizes=(opened.size,), workers=1)
    batches = loader.batches(0, 10**6)
    for _ in range(3):
        next(batches)
    views, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        views += len(next(batches))
    batches.close()
    return views / (time.perf_counter() - begin)


def in_process(run: Callable[[Setting, int], None], setting: Setting, count: int) -> int:
    """Return the highest resident size, in bytes, of a process that does something."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(run, setting, count, theirs))
    process.start()
    peak: int = ours.recv()
    process.join()
    return peak


def _measured(run: Callable[[Setting, int], None], setting: Setting, count: int, told: Any) -> None:
    run(setting, count)
    told.send(_peak())


def _peak() -> int:
    """Return the highest resident size of this process, in bytes.

    Read from /proc, for what getrusage gives begins with the highest of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def _train(setting: Setting, count: int) -> None:
    one = kind(of_sets(setting, count))
    for _ in range(3):
        one.step()


def _load(setting: Setting, count: int) -> None:
    _views_per_second(setting.cache, count, 2.0)


if __name__ == "__main__":
    main()
