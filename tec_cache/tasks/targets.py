"""Where a training batch's targets come from: what every source gives, the cache, and the pixels themselves.

All give the same `Targets`, so the student and its losses cannot tell them apart. The base in the loop is a third
source; only a program may put it there (`pipelines.training.target_sources`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tec_cache.cache.target_set import TargetSet
from tec_cache.loader import Batch
from tec_cache.targets import pixel_targets
from tec_cache.types import Targets, TargetSpec

Sources = Mapping[str, "TargetSource"]
"""What a training learns from, by the names of the sets; a set that is alone has the name ""."""


class TargetSource(Protocol):
    """Gives the targets of a batch, on the training device."""

    spec: TargetSpec
    tau: float
    weight: float
    """Of its losses among those of several sets."""
    stored: TargetSet | None
    """The set that the loader reads beside the crops, if any."""
    pixel_size: int | None
    """Size of the pixels it needs beside the student's, if any."""

    def targets(self, batch: Batch, images: torch.Tensor) -> Targets:
        """Return normalized targets of a batch on the device; images: the student's, (B, 3, S, S) normalized."""

    def identity(self) -> dict[str, Any]:
        """What identifies the targets; part of a run's settings."""


@dataclass
class CachedTargets:
    """Decoded from the cache on the training device."""

    stored: TargetSet | None
    spec: TargetSpec
    tau: float
    weight: float = 1.0
    pixel_size: int | None = None

    def targets(self, batch: Batch, images: torch.Tensor) -> Targets:
        """Decode what the loader read."""
        assert self.stored is not None
        return self.stored.decode(batch.codes[self.stored.name])

    def identity(self) -> dict[str, Any]:
        """Return the target set's name and fingerprint."""
        assert self.stored is not None
        return {"kind": "cached", "name": self.stored.name, "fingerprint": self.stored.fingerprint}


@dataclass
class PixelTargets:
    """Patch-normalized pixels: a masked autoencoder, the round zero that needs no base."""

    spec: TargetSpec
    tau: float = 1.0
    weight: float = 1.0
    stored: TargetSet | None = None
    pixel_size: int | None = None

    def targets(self, batch: Batch, images: torch.Tensor) -> Targets:
        """Cut the student's images into patches."""
        return pixel_targets(images, self.spec.grid)

    def identity(self) -> dict[str, Any]:
        """Say that these are pixels."""
        return {"kind": "pixels"}
