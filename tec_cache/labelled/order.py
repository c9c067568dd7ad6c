"""The order of an epoch's photos."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tec_cache.rng import key64, permutation


def photo_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return all numbers below count in the order of an epoch, a function of the arguments alone: (count,) int64."""
    return permutation(key64("photos", seed, epoch), count)


def share_of(count: int, rank: int, world_size: int) -> range:
    """Return the numbers below count that are a rank's: each is one rank's, and no two shares differ by more than 1."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)
