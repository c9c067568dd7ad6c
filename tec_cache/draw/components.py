"""Features as colours: the three directions in which tokens differ most become red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TAILS = 0.01
"""Share of the tokens at either end that get the ends of the scale: one outlier would make all others grey."""


@dataclass(frozen=True)
class Components:
    """Three principal components of some tokens, and the scale of their colours."""

    mean: Tensor
    """(C,) float64: the mean of the tokens."""
    directions: Tensor
    """(C, 3) float64: the directions, by falling variance; zeros if the tokens have fewer."""
    low: Tensor
    """(3,) float64: the value along each direction that becomes 0."""
    high: Tensor
    """(3,) float64: the value along each direction that becomes 1."""

    @classmethod
    def of(cls, features: Tensor) -> Components:
        """Find the components of features (..., C) of any floating type; the same features give the same signs."""
        tokens = features.detach().cpu().double().flatten(0, -2)
        mean = tokens.mean(dim=0)
        centred = tokens - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(tokens))
        found = vectors.flip(1)[:, :3]
        # an eigenvector may come with either sign: its largest entry is made positive
        largest = found.gather(0, found.abs().argmax(dim=0, keepdim=True))
        directions = torch.zeros(tokens.shape[1], 3, dtype=torch.float64)
        directions[:, : found.shape[1]] = found * largest.sign()
        values = centred @ directions
        ends = torch.tensor([TAILS, 1 - TAILS], dtype=torch.float64)
        low, high = torch.quantile(values, ends, dim=0)
        return cls(mean, directions, low, high)

    def colours(self, features: Tensor, grid_shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """Return features (B, L, C) as pictures (B, rows, columns, 3) uint8, one pixel per token."""
        values = (features.detach().cpu().double() - self.mean) @ self.directions
        shares = ((values - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)
        pictures: npt.NDArray[np.uint8] = (255 * shares).round().to(torch.uint8).unflatten(1, grid_shape).numpy()
        return pictures


def component_colours(features: Tensor, grid_shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return features (B, L, C) as pictures (B, rows, columns, 3) uint8 by their own three principal components.

    The components are those of all B views together, so colours can be compared between them. To show
    other features in the same colours, keep `Components.of(features)` and call its `colours`.
    """
    return Components.of(features).colours(features, grid_shape)
