#!/usr/bin/env python3
"""Seconds per training step: base in the loop, targets from the cache, and the limit; and where a step's time goes.

    python -m benchmarks.step                                           ViT-B/16 from ViT-B/16, batch 8
    python -m benchmarks.step --model vit_small_patch16_224
    python -m benchmarks.step --model vit_tiny_patch16_224 --batch-size 16 --workers 1
    python -m benchmarks.step --batch-size 256 --workers 15 --compile   for a GPU with 16 cores

The kinds run in turn, in stretches, in one process on the same machine; the ratios are those of the stretches of one
round. Weights are random, which does not change the time. The limit is the student's step with its images and targets
already on the device. The arithmetic's bound of online / cached for equal models is (base + student) / student =
(17.6 + 3 * 8.1) / (3 * 8.1) = 1.7 for ViT-B.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.machine import describe
from benchmarks.step.parts import parts_of_a_step, plain_base_seconds
from pipelines.extract import extract
from pipelines.train import prepare_student
from tec_cache.cache.reader import open_cache
from tec_cache.config import ExtractConfig, TrainConfig
from tec_cache.device import resolve_compute
from tec_cache.distributed import Ranks
from tec_cache.loader import Batch
from tec_cache.run.feed import on_device
from tec_cache.run.loop import Loop
from tec_cache.tasks.pretrain import MaskedBatch, Pretrain
from tec_cache.types import Targets

WARM_UP = 4
"""Steps of a stretch that are not timed: more than the loader has ready when the stretch begins."""

RELEASED = {"vit_small_patch16_224": (0.43, 1.55), "vit_base_patch16_224": (1.66, 4.14)}
"""Seconds of the released program's base and student, batch 8, float32, on two cores of some machine."""


class Kind(NamedTuple):
    """One kind of training, and what does a step of it."""

    task: Pretrain
    loop: Loop[MaskedBatch]
    step: Callable[[], None]


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="architecture of base and student")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="timed steps in each stretch")
    parser.add_argument("--rounds", type=int, default=3, help="stretches of each kind")
    parser.add_argument("--quality", default="default")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--masks-per-view", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    compute = resolve_compute(args.device, "auto")
    print(describe(str(compute.device)))
    with tempfile.TemporaryDirectory() as folder:
        kinds = prepare(args, Path(folder))
        rounds = measure(kinds, args.steps, args.rounds)
        print(f"\n{args.model} from {args.model}, batch {args.batch_size}, {compute.precision}, quality {args.quality}")
        print(f"{args.rounds} rounds of {args.steps} steps; ratios: median of the rounds (lowest to highest)")
        print("kind      s/step   images/s   of the limit")
        for name in kinds:
            median = statistics.median(found[name] for found in rounds)
            share = spread([found["limit"] / found[name] for found in rounds], "{:.1%}")
            print(f"{name:8s} {median:7.3f} {args.batch_size / median:10.1f}   {share}")
        print(f"\nonline / cached = {spread([found['online'] / found['cached'] for found in rounds], '{:.2f}')}")
        if args.model in RELEASED and args.batch_size == 8 and compute.device.type == "cpu":
            print_released(args.model, kinds["online"], rounds)
        for name in ("cached", "online"):
            print(f"\nshares of a step, {name}")
            for part, share in parts_of_a_step(*kinds[name]).items():
                print(f"  {part:42s} {share:6.1%}")


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Kind]:
    """Make photos, a base with random weights, a cache, and one training of each kind."""
    weights = folder / "base.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(args.model, num_classes=0).state_dict(), weights)
    write_photos(folder / "photos.tar", max(2 * args.batch_size, 32))
    base = {"base": f"timm:{args.model}", "base_weights": str(weights)}
    source, cache = str(folder / "photos.tar"), str(folder / "cache")
    extract(
        ExtractConfig(input=source, cache=cache, views=1, name="t", quality=args.quality, device=args.device, **base)
    )
    online = {"online": base["base"], "base_weights": base["base_weights"]}
    return {
        "limit": kind(args, cache, folder, {}, ready=True),
        "cached": kind(args, cache, folder, {}),
        "online": kind(args, cache, folder, online),
    }


def kind(args: argparse.Namespace, cache: str, folder: Path, more: dict[str, Any], *, ready: bool = False) -> Kind:
    """Return a training and a function that does one step of it and waits for the device."""
    config = TrainConfig(
        cache=cache,
        out=str(folder / "run"),
        student=args.model,
        batch_size=args.batch_size,
        masks_per_view=args.masks_per_view,
        epochs=10_000,
        device=args.device,
        workers=args.workers,
        compile=args.compile,
        checkpointing=args.checkpointing,
        **more,
    )
    compute = resolve_compute(config.device, config.precision)
    opened = open_cache(cache)
    sources, student = prepare_student(config, opened, compute)
    task = Pretrain(config, opened, sources, student, compute, Ranks())
    loop = Loop(task, config, compute, Ranks())
    batches = on_device(task.batches(0, loop.total_steps), compute.device)
    if ready:
        make_ready(task, loop, next(batches))
        batches.close()

    def step() -> None:
        loop.train_step(batches, check=False)
        if compute.device.type == "cuda":
            torch.cuda.synchronize()

    return Kind(task, loop, step)


def make_ready(task: Pretrain, loop: Loop[MaskedBatch], batch: MaskedBatch) -> None:
    """Let a training use one batch for ever, its images and targets made already."""
    images = batch.views.images(task.size, task.mean, task.std)
    (source,) = task.sources.values()
    targets = source.targets(batch.views, images)

    class Ready(Batch):
        def images(self, *_: Any) -> torch.Tensor:
            return images

    def ready_targets(*_: Any) -> Targets:
        return targets

    there = MaskedBatch(Ready(**vars(batch.views)), batch.noise)
    loop.next_batch = lambda _: there  # type: ignore[method-assign]
    source.targets = ready_targets  # type: ignore[method-assign]


def measure(kinds: dict[str, Kind], steps: int, rounds: int) -> list[dict[str, float]]:
    """Return the median seconds of a step of each kind in each round."""
    found = []
    for _ in range(rounds):
        medians = {}
        for name, (_, _, step) in kinds.items():
            # a stretch of one kind at a time: the loader of another one must not refill its queue meanwhile
            seconds = []
            for _ in range(WARM_UP + steps):
                begin = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - begin)
            medians[name] = statistics.median(seconds[WARM_UP:])
        found.append(medians)
    return found


def spread(values: list[float], how: str) -> str:
    """Write the median of some rounds, and the lowest and highest."""
    return f"{how.format(statistics.median(values))} ({how.format(min(values))} to {how.format(max(values))})"


def print_released(model: str, online: Kind, rounds: list[dict[str, float]]) -> None:
    """Compare with the released program's published seconds, scaled by the speed of one and the same base."""
    base, student = RELEASED[model]
    here = plain_base_seconds(online.task, 8)
    whole = (base + student) * here / base
    cached = statistics.median(found["cached"] for found in rounds)
    print(f"the base with plain attention takes {here:.2f} s here, {base} s where the released program was measured;")
    print(f"its online step of {base + student:.2f} s there is {whole:.2f} s here (computed),")
    print(f"{whole / cached:.2f} times a cached step")


def write_photos(path: Path, count: int) -> None:
    """Write smooth random pictures of the size of ImageNet photos; only their decoding time matters."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            stream = io.BytesIO()
            image.resize((500, 375), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
            info = tarfile.TarInfo(f"p{i:05d}.jpg")
            info.size = stream.tell()
            stream.seek(0)
            tar.addfile(info, stream)


if __name__ == "__main__":
    main()
