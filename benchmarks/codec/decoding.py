#!/usr/bin/env python3
"""What decoding a view costs one CPU core, and how much of that nobody could leave out.

    python -m benchmarks.codec.decoding 'photos-*.tar' WEIGHTS --base timm:vit_small_patch14_dinov2.lvd142m

Codecs are fitted on all shards but the last, as in `benchmarks.codec`; views of the last are decoded. The floor is the
arithmetic alone, with operands that are already where it wants them: the products with the bases, each of the shape
that decoding uses, and the inverse DCT. What decoding takes beyond that moves bytes: unfolding signs, gathering levels
in the order of the products, widening them to float32, putting rows in the order of the grid. The kinds take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.codec.__main__ import QUALITIES, targets_of, views_of
from benchmarks.machine import describe
from tec_cache.base.load import load_base
from tec_cache.codec.fit import fit_transform
from tec_cache.codec.grid import CPU_VALUES, GridTransform, grid_dct
from tec_cache.codec.transform import TransformCodec
from tec_cache.data.source import open_source

Work = Callable[[], object]


def main() -> None:
    """Print a line for each quality."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="two shards of photos or more")
    parser.add_argument("weights", help="weight file of the base")
    parser.add_argument("--base", default="timm:vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--views", type=int, default=64, help="decoded at a time")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    print(describe("cpu"))
    base = load_base(args.base, args.weights, grid=14, k=15)
    images = [views_of(shard, base) for shard in open_source(args.data).shards]
    fit, held = (targets_of(base, torch.cat(part)) for part in (images[:-1], images[-1:]))
    torch.set_num_threads(1)
    print(f"one thread, {args.views} views at a time, {args.rounds} rounds; ms a view, median (lowest)")
    print("quality      decode            products          DCT               floor's share of decode")
    for name, (mse, kl) in QUALITIES.items():
        codec = fit_transform(fit, base.spec("patch"), mse=mse, kl=kl)
        arrays = codec.encode(held, codec.spec)
        stored = {array: torch.from_numpy(values[: args.views]) for array, values in arrays.items()}
        kinds = {"decode": partial(codec.decode, stored, codec.spec), **floor(codec, args.views)}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(args.rounds + 5):
            for kind, work in kinds.items():
                begin = time.perf_counter()
                work()
                if number >= 5:  # the first make what is kept
                    times[kind].append(1000 * (time.perf_counter() - begin) / args.views)
        middle = {kind: statistics.median(values) for kind, values in times.items()}
        cells = [f"{middle[kind]:.3f} ({min(values):.3f})".ljust(17) for kind, values in times.items()]
        print(f"{name:12}", *cells, f"{(middle['products'] + middle['DCT']) / middle['decode']:.0%}", flush=True)


def floor(codec: TransformCodec, views: int) -> dict[str, Work]:
    """Return the products and the inverse DCTs of decoding so many views, features and attention."""
    products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    spectra: list[tuple[GridTransform, torch.Tensor, torch.Tensor]] = []
    for grid in (codec.features, codec.attention):
        assert grid is not None
        length, width = len(grid.frequencies), len(grid.mean)
        for few in torch.arange(views).split(max(1, CPU_VALUES // (length * width))):  # as decoding divides them
            for piece in grid._plan.pieces:
                rows, count = len(few) * len(piece.places) // len(piece.basis), len(piece.basis)
                products.append((torch.randn(rows, count), piece.basis, torch.empty(rows, width)))
            spectrum = torch.randn(len(few), length, width)
            spectra.append((grid, spectrum, torch.empty_like(spectrum)))
    return {
        "products": lambda: [torch.mm(levels, basis, out=out) for levels, basis, out in products],
        "DCT": lambda: [grid_dct(s, grid.grid_shape, inverse=True, out=out) for grid, s, out in spectra],
    }


if __name__ == "__main__":
    main()
