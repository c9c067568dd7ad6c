#!/usr/bin/env python3
"""Seconds of a step of `finetune` against the bare model: forward, backward and optimizer on a batch in memory.

    python -m benchmarks.tuning.step 'photos-*.tar'
    python -m benchmarks.tuning.step 'photos-*.tar' --model vit_base_patch16_224 --batch 128 --device cuda

Ours reads, decodes and augments other photos for every step, as a run does, and does all that the loop does but
logging and saving. The bare model has the same parameters, groups, optimizer and losses. The two take turns; figures
are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing

import torch

from benchmarks.machine import describe
from pipelines.finetune import Photos, readers
from pipelines.loading.encoder_source import load_encoder
from pipelines.training.running import prepared_compute
from tec_cache.distributed import Ranks
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.finetune.model import create_classifier
from tec_cache.finetune.recipes import RECIPES
from tec_cache.run.feed import on_device
from tec_cache.run.loop import Loop
from tec_cache.tasks.classify import Classify


def main() -> None:
    """Measure and print the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="shards of labelled photos")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="of each kind in each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(describe(args.device))
    recipe, ranks = RECIPES["mae-b-300"], Ranks()
    config = FinetuneConfig(
        model=f"random:{args.model}",
        train=args.photos,
        select=0.1,
        out="unused",
        batch_size=args.batch,
        device=args.device,
        workers=args.workers,
        epochs=1000,
    ).resolved(recipe)
    compute = prepared_compute(config, ranks)
    photos = Photos.found(config, quiet=True)
    model = create_classifier(load_encoder(config.model), max(photos.num_classes, 2), drop_path=config.drop_path or 0.0)
    learned, judged = readers(config, model, photos, compute, ranks)
    task = Classify(config, recipe, model, learned, judged, compute, ranks)
    loop = Loop(task, config, compute, ranks)
    count = 1 + args.steps * args.rounds
    ours, bare = [], []
    with closing(on_device(task.batches(0, count), compute.device)) as batches:
        kept = next(batches)
        for _ in range(args.rounds):
            begin = waited(args.device)
            for _ in range(args.steps):
                loop.train_step(batches, check=False)
            ours.append((waited(args.device) - begin) / args.steps)
            begin = waited(args.device)
            for _ in range(args.steps):
                loop.optimizer.zero_grad(set_to_none=True)
                with compute.autocast():
                    loss = task.losses(loop.model, kept)["loss"]
                loss.backward()
                loop.optimizer.step()
            bare.append((waited(args.device) - begin) / args.steps)
    step, model_alone = statistics.median(ours), statistics.median(bare)
    print(f"{args.model}, batch {args.batch}: {step:.4f} s a step, the bare model {model_alone:.4f} s")
    print(f"the bare model takes {model_alone / step:.1%} of a step")


def waited(device: str) -> float:
    """Return the time once the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
