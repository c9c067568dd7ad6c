#!/usr/bin/env python3
"""Is the plan right? Plans an extraction, carries it out in another folder of the same disk, compares.

    python -m benchmarks.plan 'photos-*.tar' WEIGHTS --base timm:vit_small_patch14_dinov2.lvd142m --views 2
    python -m benchmarks.plan 'photos-*.tar' WEIGHTS --quality exact --train-steps 6

Bytes can be compared on any machine, hours only on one that does nothing else. `--train-steps` also trains, cached
and with the base in the loop, and compares the seconds of a step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import describe
from pipelines.extract import extract
from pipelines.extraction.extract_summary import Summary
from pipelines.plan import plan
from pipelines.planning.result import Plan
from pipelines.train import train
from tec_cache.config import ExtractConfig, PlanConfig, TrainConfig
from tec_cache.device import resolve_compute


def main() -> None:
    """Plan, extract, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shards of photos")
    parser.add_argument("weights", help="weight file of the base")
    parser.add_argument("--base", default="timm:vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--student", default="vit_small_patch16_224")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--quality", default="default")
    parser.add_argument("--seconds", type=float, default=PlanConfig.__dataclass_fields__["seconds"].default)
    parser.add_argument("--batch-size", type=int, default=16, help="of the training")
    parser.add_argument("--train-steps", type=int, default=0, help="steps of each training; 0: none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="where the disk is that is meant; default: a temporary folder")
    args = parser.parse_args()
    print(describe(str(resolve_compute(args.device, "auto").device)))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Print plan, reality and their ratio."""
    stage_one = ExtractConfig(
        input=args.data, cache=str(folder / "cache"), base=args.base, base_weights=args.weights, views=args.views,
        quality=args.quality, device=args.device,
    )  # fmt: skip
    stage_two = TrainConfig(
        cache=stage_one.cache, out=str(folder / "run"), student=args.student, batch_size=args.batch_size,
        device=args.device,
    )  # fmt: skip
    planned = plan(PlanConfig(extract=stage_one, train=stage_two, seconds=args.seconds))
    begin = time.monotonic()
    real = extract(stage_one)
    seconds = time.monotonic() - begin
    print(f"\n{args.base}, quality {args.quality}, {real.photos} photos, {args.views} views, "
          f"planned in {planned.measured_seconds:.1f} s")  # fmt: skip
    print("                              plan           real   plan / real")
    for name, one, other in rows(planned, real, seconds, folder / "cache"):
        print(f"{name:22s} {one:12,.1f} {other:14,.1f} {one / other:13.3f}")
    for name, value in planned.seconds.items():
        print(f"  {name:22s} {value:10.2f} s planned")
    for kind in ("cached", "online") if args.train_steps else ():
        step = planned.epoch_seconds[kind] / planned.amount.photos * args.batch_size
        found = step_seconds(stage_two, kind, args, folder)
        print(f"s per step, {kind:10s} {step:12.3f} {found:14.3f} {step / found:13.3f}")


def rows(planned: Plan, real: Summary, seconds: float, cache: Path) -> list[tuple[str, float, float]]:
    """Return (what, planned, real) of everything that both know."""
    disk = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return [
        ("photos", planned.amount.photos, real.photos),
        ("bytes per crop", planned.views.written.num_bytes, real.bytes_per_crop),
        ("bytes per target", planned.bytes_per_target, real.bytes_per_target),
        ("bytes on disk", planned.bytes_needed, disk),
        ("seconds", planned.total_seconds, seconds),
    ]


def step_seconds(config: TrainConfig, kind: str, args: argparse.Namespace, folder: Path) -> float:
    """Train twice, a few and three times as many steps; the difference is free of the beginning."""
    base = {"online": args.base, "base_weights": args.weights} if kind == "online" else {}
    spent = []
    for steps in (args.train_steps, 3 * args.train_steps):
        run = {"out": str(folder / f"run-{kind}-{steps}"), "steps": steps, "save_every": 1e6}
        spent.append(train(replace(config, **(base | run))).seconds)
    return (spent[1] - spent[0]) / (2 * args.train_steps)


if __name__ == "__main__":
    main()
