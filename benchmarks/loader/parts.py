"""Where the loader's time goes, what decoding costs on the device, and how well an order mixes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from tec_cache.cache import target_set
from tec_cache.cache.target_set import TargetSet
from tec_cache.loader import EpochOrder, loader, units

IMAGENET_UNITS = 1251


def parts_of_a_view(one_pass: Callable[[], Iterator[int]]) -> dict[str, float]:
    """Return the CPU seconds of one view by part, from a pass with the parts' functions timed."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.thread_time() - begin

        return call

    sum(one_pass())
    with (
        mock.patch.object(units.OpenUnit, "block", timed("block", units.OpenUnit.block)),
        mock.patch.object(target_set, "read_block", timed("decompression", target_set.read_block)),
        mock.patch.object(loader, "decode_crop", timed("JPEG", loader.decode_crop)),
    ):
        begin = time.process_time()
        views = sum(one_pass())
        whole = time.process_time() - begin
    rest = whole - spent["block"] - spent["JPEG"]
    return {
        "JPEG decoding": spent["JPEG"] / views,
        "decompression": spent["decompression"] / views,
        "reading and checksums": (spent["block"] - spent["decompression"]) / views,
        "order, shuffling, batching, noise, opening units": rest / views,
        "all": whole / views,
    }


def decoding_seconds(targets: TargetSet) -> float:
    """Return the seconds in which a view's codes become float targets on torch's device, here the CPU."""
    unit = targets.units[0]
    arrays = targets.read_block(targets.record(unit), 0)
    codes = {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}
    seconds = []
    for _ in range(12):
        begin = time.perf_counter()
        targets.decode(codes)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:]) / len(codes["features"])


def largest_share(order: EpochOrder, batch_size: int) -> float:
    """Return how well an order mixes: the mean, over batches, of the share that the most frequent unit has."""
    shares = []
    for start in range(0, len(order) - batch_size + 1, batch_size):
        of_rows, _ = order.places(start, start + batch_size)
        shares.append(np.bincount(of_rows).max() / batch_size)
    return float(np.mean(shares))


def mixing() -> str:
    """Return a table of how well orders mix an epoch of ImageNet-1k's size."""
    counts = [1024] * IMAGENET_UNITS
    lines = ["shuffle buffer   batch 256   batch 4,096"]
    for rows in (1024, 4096, 16384, sum(counts)):
        order = EpochOrder(counts, seed=0, epoch=0, buffer_blocks=rows // 32)
        shares = [largest_share(order, batch) for batch in (256, 4096)]
        name = f"{rows:,}" if rows < sum(counts) else "everything"
        lines.append(f"{name:14s} {shares[0]:11.2%} {shares[1]:13.2%}")
    return "\n".join(lines)
