"""How a step's batch is cut: among processes, and in each of them into forward passes."""

from __future__ import annotations

import math

from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError
from tec_cache.loop_settings import LoopSettings
from tec_cache.printable import counted

WORTH = 4
"""A divisor that is so many times smaller than what fits is not worth it: many small passes are far slower."""


def count_micro_batches(config: LoopSettings, ranks: Ranks) -> int:
    """Return how many forward passes a process makes for one step. ConfigError where the batch does not divide."""
    masks = config.rows_together
    share = config.batch_size // ranks.world_size
    each = f" and {masks} masks for each view" if masks > 1 else ""
    if config.batch_size % (ranks.world_size * masks):
        raise ConfigError(
            f"a batch of {config.batch_size} does not divide among {ranks.world_size} processes{each}",
            todo=f"use a --batch-size that {ranks.world_size * masks} divides",
        )
    count = math.ceil(share / (config.micro_batch or share))
    if share % (count * masks):
        raise ConfigError(
            f"a process's {counted(share // masks, 'view')} cannot be divided into micro-batches of "
            + f"{config.micro_batch}"
            + (f", {masks} masks for each view" if masks > 1 else ""),
            todo=f"use a --micro-batch that divides {share}" + (f" and that {masks} divides" if masks > 1 else ""),
        )
    return count


def fitting(config: LoopSettings, ranks: Ranks, most: int) -> int:
    """Return the micro-batch for a process's share where none is asked for: at most `most`, if that divides well.

    It is the largest divisor of the share up to `most`; where that is small (`WORTH`), the next one above.
    """
    sizes = _sizes(config, ranks)
    below = [size for size in sizes if size <= most]
    above = [size for size in sizes if size > most]
    if above and (not below or below[-1] * WORTH < most):
        return above[0]
    return below[-1]


def next_smaller(config: LoopSettings, ranks: Ranks, micro_batch: int) -> int | None:
    """Return the largest micro-batch below one, None where there is none."""
    return max((size for size in _sizes(config, ranks) if size < micro_batch), default=None)


def _sizes(config: LoopSettings, ranks: Ranks) -> list[int]:
    """List what a process's share can be cut into, smallest first; at least the share."""
    share, masks = max(1, config.batch_size // ranks.world_size), config.rows_together
    low = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    sizes = sorted({*low, *(share // size for size in low)})
    return [size for size in sizes if size % masks == 0] or [share]
