#!/usr/bin/env python3
"""Seconds per training step: base in the loop, targets from the cache, and the limit.

    python -m benchmarks.step                                   ViT-B/16 from ViT-B/16, batch 8
    python -m benchmarks.step --model vit_small_patch16_224

The kinds run in turn in one process on the same machine, so their ratios can be compared; weights
are random, which does not change the time. The limit is the student's step with its inputs and targets already on
the device. The arithmetic's bound for equal models is (base forward + student) / student = (17.6 + 3 * 8.3) /
(3 * 8.3) = 1.7 for ViT-B.
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
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.machine import describe
from pipelines.extract import extract
from pipelines.train import prepare_student
from pipelines.trainer import Trainer
from tec_cache.cache.reader import open_cache
from tec_cache.config import ExtractConfig, TrainConfig
from tec_cache.device import resolve_compute
from tec_cache.distributed import Ranks

ROUNDS = 2
"""Stretches of each kind, so that a slow drift of the machine meets all kinds."""
WARM_UP = 4
"""Steps of a stretch that are not timed: more than the loader has ready when the stretch begins."""


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="architecture of base and student")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="timed steps in each of two stretches")
    parser.add_argument("--quality", default="default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    print(describe(str(resolve_compute(args.device, "auto").device)))
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(args, Path(folder))
    limit = statistics.median(seconds["limit"])
    timed = f"median of {ROUNDS * args.steps} steps"
    print(f"\n{args.model} from {args.model}, batch {args.batch_size}, {args.quality}, {timed}")
    print("kind      s/step   images/s   of the limit")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:8s} {median:7.3f} {args.batch_size / median:10.1f} {limit / median:13.1%}")
    ratio = statistics.median(seconds["online"]) / statistics.median(seconds["cached"])
    print(f"\nonline / cached = {ratio:.2f}")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of each timed step of each kind."""
    weights = folder / "base.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(args.model, num_classes=0).state_dict(), weights)
    write_photos(folder / "photos.tar", max(2 * args.batch_size, 32))
    base = {"base": f"timm:{args.model}", "base_weights": str(weights)}
    source, cache = str(folder / "photos.tar"), str(folder / "cache")
    extract(
        ExtractConfig(input=source, cache=cache, views=1, name="t", quality=args.quality, device=args.device, **base)
    )
    kinds: dict[str, dict[str, Any]] = {
        "cached": {},
        "online": {"online": base["base"], "base_weights": base["base_weights"]},
    }
    steps: dict[str, Callable[[], None]] = {name: stepper(args, cache, folder, more) for name, more in kinds.items()}
    steps["limit"] = stepper(args, cache, folder, {}, ready=True)
    seconds: dict[str, list[float]] = {name: [] for name in ("limit", "cached", "online")}
    for _ in range(ROUNDS):
        for name in seconds:
            # a stretch of one kind at a time: the loader of another one must not refill its queue meanwhile
            for turn in range(WARM_UP + args.steps):
                begin = time.perf_counter()
                steps[name]()
                if turn >= WARM_UP:
                    seconds[name].append(time.perf_counter() - begin)
    return seconds


def stepper(
    args: argparse.Namespace, cache: str, folder: Path, more: dict[str, Any], *, ready: bool = False
) -> Callable[[], None]:
    """Return a function that does one training step of a kind and waits for the device."""
    config = TrainConfig(
        cache=cache,
        out=str(folder / "run"),
        student=args.model,
        batch_size=args.batch_size,
        epochs=10_000,
        device=args.device,
        workers=args.workers,
        **more,
    )
    compute = resolve_compute(config.device, config.precision)
    opened = open_cache(cache)
    source, student = prepare_student(config, opened, compute)
    trainer = Trainer(config, opened, source, student, compute, Ranks())
    batches = trainer.loader.batches(0, trainer.total_steps)
    if ready:
        epoch, parts = next(batches)
        images = parts[0].images(trainer.size, compute.device, trainer.mean, trainer.std)
        targets = source.targets(parts[0], images)
        object.__setattr__(parts[0], "images", lambda *_: images)
        source.targets = lambda *_: targets  # type: ignore[method-assign]

    def step() -> None:
        if ready:
            trainer.train_step(epoch, parts)
        else:
            trainer.train_step(*next(batches))
        if compute.device.type == "cuda":
            torch.cuda.synchronize()

    return step


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
