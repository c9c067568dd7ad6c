"""Paired differences of accuracies by test photo and seed, with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 4000
CONFIDENCE = 0.95

Hits = npt.NDArray[np.float64]
"""(seeds, photos), 1 where a model of that seed is right about that photo."""


@dataclass(frozen=True)
class Interval:
    """A difference in percentage points."""

    mean: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def text(self) -> str:
        """Write it."""
        said = f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        return f"**{said}**" if self.resolved else said


def bootstrap(ours: Hits, reference: Hits, *, seed: int = 0) -> Interval:
    """Return the difference of two arms, both given as hits of the same seeds on the same photos.

    Pairs stay pairs: a draw takes seeds and photos with replacement, the same ones of both arms. Seeds are few, and a
    bootstrap over three of them gives intervals that are too narrow rather than too wide.
    """
    if ours.shape != reference.shape:
        raise ValueError(f"hits of {ours.shape} and {reference.shape}")
    difference = 100 * (ours - reference)
    draw = np.random.default_rng(seed)
    seeds, photos = difference.shape
    found = np.empty(DRAWS)
    for number in range(DRAWS):
        weights = np.bincount(draw.integers(seeds, size=seeds), minlength=seeds) / seeds
        chosen = np.bincount(draw.integers(photos, size=photos), minlength=photos) / photos
        found[number] = weights @ difference @ chosen
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(float(difference.mean()), float(low), float(high))
