"""Which patches the student sees: noise per sample, ascending order, the first quarter is kept."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tec_cache.rng import key64, uniform


class Mask(NamedTuple):
    """An order of the patches of each view; the first `num_visible` of it are seen.

    order:   (B, L) int64, patch numbers by ascending noise.
    restore: (B, L) int64, the inverse: position of each patch in `order`.
    """

    order: torch.Tensor
    restore: torch.Tensor
    num_visible: int

    @property
    def visible(self) -> torch.Tensor:
        """Patch numbers that are seen: (B, num_visible)."""
        return self.order[:, : self.num_visible]

    @property
    def masked(self) -> torch.Tensor:
        """Patch numbers that are not: (B, L - num_visible)."""
        return self.order[:, self.num_visible :]


def random_mask(noise: torch.Tensor, mask_ratio: float) -> Mask:
    """Make a mask from noise (B, L); int(L * (1 - mask_ratio)) patches stay visible."""
    order = noise.argsort(dim=1, stable=True)
    return Mask(order, order.argsort(dim=1), num_visible_patches(noise.shape[1], mask_ratio))


def num_visible_patches(num_tokens: int, mask_ratio: float) -> int:
    """Return int(L * (1 - mask_ratio)), robust to 1 - 0.9 not being 0.1 in binary."""
    return int(round(num_tokens * (1 - mask_ratio), 9))


def mask_noise(
    sample_keys: npt.NDArray[np.uint64], *, seed: int, epoch: int, num_tokens: int, mask_number: int = 0
) -> torch.Tensor:
    """Return the noise (B, L) float32 of some samples: a pure function of (seed, epoch, sample, mask number).

    sample_keys: (B,) 64-bit keys of (source shard, key).
    """
    salt = np.uint64(key64("mask", seed, epoch, mask_number))
    return torch.from_numpy(uniform(sample_keys ^ salt, num_tokens).astype(np.float32))
