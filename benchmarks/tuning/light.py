#!/usr/bin/env python3
"""The order of light tuning: head, input adapter, encoder adapters, each over several seeds, and the random controls.

    python -m benchmarks.tuning.light EXPORT BASE --train 'train-*.tar' --test 'test-*.tar' --out runs/light

EXPORT: of a training with adapters; BASE: the model that it learned from. Every arm has the same recipe, photos and
epochs. A seed draws the head, the random adapters, the order and the crops of the photos. Whatever is chosen (learning
rate, epochs) is chosen beforehand. Runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from pipelines.finetune import finetune
from tec_cache.finetune.config import FinetuneConfig

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "base: head": ("base", {"tune": "head", "rule": "tec"}),
    "base: + random input adapter": ("base", {"tune": "input-adapter", "adapters_from": "random"}),
    "base: + random encoder adapters": ("base", {"tune": "adapters", "adapters_from": "random"}),
    "new: head": ("new", {"tune": "head", "rule": "tec"}),
    "new: + random input adapter": ("new", {"tune": "input-adapter", "adapters_from": "random"}),
    "new: + input adapter": ("new", {"tune": "input-adapter"}),
    "new: + random encoder adapters": ("new", {"tune": "adapters", "adapters_from": "random"}),
    "new: + encoder adapters": ("new", {"tune": "adapters"}),
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("base")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", required=True, help="folder of all runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--base-lr", type=float, default=0.1)
    parser.add_argument("--only", default="", help="arms whose name begins so")
    args = parser.parse_args()
    print(describe("cpu"))
    print(f"{'arm':<34} {'trained':>9}  top-1 of each seed {'':<8} mean   deviation")
    for name, (model, how) in ARMS.items():
        if not name.startswith(args.only):
            continue
        reached, trained = [], 0
        for seed in range(args.seeds):
            config = FinetuneConfig(
                model=args.export if model == "new" else args.base,
                train=args.train,
                test=args.test,
                out=str(Path(args.out) / f"{name.replace(': ', '-').replace(' ', '_')}-{seed}"),
                recipe="light",
                epochs=args.epochs,
                batch_size=args.batch_size,
                base_lr=args.base_lr,
                judge_every=args.epochs,
                seed=seed,
                workers=1,
                **how,
            )
            summary = finetune(config)
            reached.append(summary.last["test_top1"])
            trained = summary.trained_parameters
        spread = statistics.stdev(reached) if len(reached) > 1 else 0.0
        each = "  ".join(f"{value:.2%}" for value in reached)
        print(f"{name:<34} {trained:>9,}  {each}  {statistics.mean(reached):.2%}  {spread:.2%}", flush=True)


if __name__ == "__main__":
    main()
