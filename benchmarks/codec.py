#!/usr/bin/env python3
"""Bytes per view against error, for every codec, on real photos and a real base.

    python -m benchmarks.codec 'photos-*.tar' WEIGHTS --base timm:vit_small_patch14_dinov2.lvd142m

The error is that of the stored targets against the base's exact ones on the same stored crops: relative mean
squared error of the normalized features, and KL divergence of the attention rows in nats at tau 1.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.machine import describe
from pipelines.extract import extract
from tec_cache.base.load import load_base
from tec_cache.cache.reader import open_cache
from tec_cache.codec import CODECS
from tec_cache.config import ExtractConfig
from tec_cache.loader import Loader
from tec_cache.targets import normalize_targets


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shards of photos")
    parser.add_argument("weights", help="weight file of the base")
    parser.add_argument("--base", default="timm:vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--limit", type=int, default=128, help="photos")
    args = parser.parse_args()
    print(describe("cpu"))
    print(f"\n{args.base}, {args.limit} photos, one random view each")
    print("codec   bytes per view   of fp16 uncompressed   relative MSE   KL (nats)")
    with tempfile.TemporaryDirectory() as folder:
        cache = str(Path(folder) / "cache")
        extract(ExtractConfig(input=args.data, cache=cache, views=1, views_only=True, limit=args.limit))
        for codec in CODECS:
            extract(ExtractConfig(cache=cache, base=args.base, base_weights=args.weights, name=codec, codec=codec))
            size, raw, mse, kl = measure(cache, codec, args.base, args.weights)
            print(f"{codec:6s} {size:15,.0f} {size / raw:22.1%} {mse:14.2e} {kl:11.2e}")


def measure(cache_path: str, name: str, base_name: str, weights: str) -> tuple[float, float, float, float]:
    """Return bytes per view on disk, bytes of raw fp16, relative MSE and mean KL."""
    cache = open_cache(cache_path)
    stored = cache[name]
    spec = stored.spec
    records = [stored.record(unit) for unit in cache.view_units]
    rows = sum(record.count for record in records)
    size = sum(record.num_bytes for record in records) / rows
    base = load_base(base_name, weights, grid=cache.grid, k=spec.k)
    mean, std = torch.tensor(base.mean), torch.tensor(base.std)
    loader = Loader(cache, stored, batch_size=16, pixel_sizes=(base.input_size,))
    error, energy, divergence, batches = 0.0, 0.0, 0.0, 0
    for _, (batch,) in loader.batches(0, loader.steps_per_epoch):
        images = batch.images(base.input_size, torch.device("cpu"), mean, std)
        exact, coded = normalize_targets(base(images), spec.normalization), stored.decode(batch.codes)
        error += (exact.features - coded.features).square().sum().item()
        energy += exact.features.square().sum().item()
        assert exact.attention is not None
        assert coded.attention is not None
        p, q = exact.attention.log_softmax(-1), coded.attention.log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum(-1).mean().item()
        batches += 1
    raw = 2 * (spec.num_tokens * spec.channels + spec.num_heads * spec.num_rows * spec.num_tokens)
    return size, raw, error / energy, divergence / batches


if __name__ == "__main__":
    main()
