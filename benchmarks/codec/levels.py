#!/usr/bin/env python3
"""How hard to compress codes, and what products of half precision cost: two tables.

    python -m benchmarks.codec.levels 'photos-*.tar' WEIGHTS --base timm:vit_small_patch14_dinov2.lvd142m

All shards but the last are fitted on, the last is measured, as in `benchmarks.codec`. One thread, CPU time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from numcodecs import Blosc, Zstd, blosc

from benchmarks.codec.__main__ import QUALITIES, targets_of, views_of
from benchmarks.machine import describe
from tec_cache.base.load import load_base
from tec_cache.cache.layout import BLOCK_ROWS
from tec_cache.codec import grid
from tec_cache.codec.errors import target_errors
from tec_cache.codec.fit import fit_transform
from tec_cache.codec.transform import TransformCodec
from tec_cache.data.source import open_source
from tec_cache.types import Targets

ROUNDS = 3
KIB = 1024
BITS, BYTES = Blosc.BITSHUFFLE, Blosc.NOSHUFFLE
BLOSC = [
    *(("zstd", level, BITS, split) for split in (128, 512, 2048) for level in (1, 2, 3, 5, 6, 7)),
    ("zstd", 1, BYTES, 128), ("lz4", 5, BITS, 128), ("lz4hc", 5, BITS, 128),
]  # fmt: skip
ZSTD = (-5, -1, 1, 3, 7)
"""Levels without Blosc."""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="two shards of photos or more")
    parser.add_argument("weights", help="weight file of the base")
    parser.add_argument("--base", default="timm:vit_small_patch14_dinov2.lvd142m")
    args = parser.parse_args()
    print(describe("cpu"))
    base = load_base(args.base, args.weights, grid=14, k=15)
    images = [views_of(shard, base) for shard in open_source(args.data).shards]
    fit, held = (targets_of(base, torch.cat(part)) for part in (images[:-1], images[-1:]))
    codecs = [(name, fit_transform(fit, base.spec("patch"), mse=q[0], kl=q[1])) for name, q in QUALITIES.items()]
    torch.set_num_threads(1)
    blosc.use_threads = False
    for name, codec in codecs:
        print(f"\n{name}, {len(held.features)} views: bytes a view, ms a view to compress and to decompress")
        blocks = blocks_of(codec, held)
        for kind, level, shuffle, split in BLOSC:
            how = Blosc(kind, level, shuffle, split * KIB)
            label = f"{kind} {level}, {'bits' if shuffle == BITS else 'bytes'}, {split} KiB"
            print(f"{label:28}", measured(blocks, how.encode, blosc.decompress))
        for level in ZSTD:
            print(f"{f'zstd {level} without Blosc':28}", measured(blocks, Zstd(level).encode, Zstd(level).decode))
    print("\nrelative MSE in float32, with products of half precision, and what these and TF32's add by themselves")
    for name, codec in codecs:
        print(f"{name:10}", precision(codec, held))


def blocks_of(codec: TransformCodec, held: Targets) -> list[npt.NDArray[np.generic]]:
    """Return the codes of whole blocks of views, each laid out as a cache stores it."""
    arrays, specs = codec.encode(held, codec.spec), codec.arrays(codec.spec)
    whole = range(0, len(held.features) // BLOCK_ROWS * BLOCK_ROWS, BLOCK_ROWS)
    parts = [(name, arrays[name][start : start + BLOCK_ROWS]) for name in ("features", "attention") for start in whole]
    return [np.ascontiguousarray(part.transpose(specs[name].order)) for name, part in parts]


def measured(
    blocks: Sequence[npt.NDArray[np.generic]], encode: Callable[..., bytes], decode: Callable[..., bytes]
) -> str:
    """Compress and decompress all blocks; the fastest of some rounds."""
    views, times = len(blocks) // 2 * BLOCK_ROWS, []
    for _ in range(ROUNDS):
        begin = time.process_time()
        coded = [encode(block) for block in blocks]
        middle = time.process_time()
        for data in coded:
            decode(data)
        times.append((middle - begin, time.process_time() - middle))
    compress, decompress = (1000 * min(part) / views for part in zip(*times, strict=True))
    return f"{sum(map(len, coded)) / views:10,.0f} {compress:8.2f} {decompress:8.3f}"


def precision(codec: TransformCodec, held: Targets) -> str:
    """Decode with products in float32, in half precision as on a GPU, and of operands rounded to TF32."""
    stored = {name: torch.from_numpy(values) for name, values in codec.encode(held, codec.spec).items()}
    product = torch.mm

    def rounded(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return product(to_tf32(a), to_tf32(b), out=out)

    def decoded() -> Targets:
        return TransformCodec.from_bytes(codec.to_bytes()).decode(stored, codec.spec)

    exact = decoded()
    with patch.object(grid, "product_dtype", lambda device: torch.float16):
        half = decoded()
    with patch.object(torch, "mm", rounded):
        tf32 = decoded()
    both = (target_errors(held, x).mse for x in (exact, half))
    own = (target_errors(exact, x).mse for x in (half, tf32))
    return " ".join([*(f"{x:10.6f}" for x in both), *(f"{x:9.1e}" for x in own)])


def to_tf32(values: torch.Tensor) -> torch.Tensor:
    """Round float32 to the 10 bits of mantissa that TF32 has, half to even."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


if __name__ == "__main__":
    main()
