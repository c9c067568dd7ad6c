"""How a step's batch is cut: among processes, and in each of them into forward passes."""

from __future__ import annotations

import math

from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError
from tec_cache.loop_settings import LoopSettings


def count_micro_batches(config: LoopSettings, ranks: Ranks, masks: int = 1) -> int:
    """Return how many forward passes a process makes for one step.

    masks: rows of the batch that belong to one view and stay together. ConfigError where the batch does not divide.
    """
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
            f"{share // masks} views per process do not divide into micro-batches of {config.micro_batch}"
            + (f", {masks} masks for each view" if masks > 1 else ""),
            todo=f"use a --micro-batch that divides {share}" + (f" and that {masks} divides" if masks > 1 else ""),
        )
    return count
