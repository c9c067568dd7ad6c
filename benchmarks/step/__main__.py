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
import statistics
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from benchmarks.machine import describe
from benchmarks.photos import write_photos
from benchmarks.step.kinds import Kind, Setting, measure, three_kinds
from benchmarks.step.parts import parts_of_a_step, plain_base_seconds
from pipelines.extract import extract
from tec_cache.config import ExtractConfig
from tec_cache.device import resolve_compute

RELEASED = {"vit_small_patch16_224": (0.43, 1.55), "vit_base_patch16_224": (1.66, 4.14)}
"""Seconds of the released program's base and student, batch 8, float32, on two cores of some machine."""


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
    more = {name: getattr(args, name) for name in ("masks_per_view", "workers", "checkpointing")}
    setting = Setting(
        cache,
        folder / "run",
        args.model,
        args.batch_size,
        args.device,
        compile=args.compile,
        more=more,
    )
    return three_kinds(setting, {"online": (base["base"],), "base_weights": base["base_weights"]})


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


if __name__ == "__main__":
    main()
