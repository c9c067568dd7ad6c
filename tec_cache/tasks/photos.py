"""What a task asks of those who give it annotated photos: `labelled` reads them, and programs put both together."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch


class Annotated(Protocol):
    """A batch of photos: as `labelled.LabelledBatch`."""

    @property
    def images(self) -> torch.Tensor:
        """(B, 3, S, S) float32, normalized."""

    @property
    def labels(self) -> torch.Tensor:
        """(B,) int64, or (B, H, W) of masks."""

    @property
    def epoch(self) -> int:
        """Of the training."""

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """(B,), which photos these are; always on the host."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Self:
        """Return the same batch on a device."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all that lies on the batch's device."""


class Learned(Protocol):
    """Gives the photos that are learned from."""

    damaged: set[str]

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""

    def batches(self, start_step: int, stop_step: int, *, micro_batches: int = 1) -> Generator[Annotated, None, None]:
        """Yield this rank's batches of some steps."""


class Judged(Protocol):
    """Gives the photos that are judged on."""

    damaged: set[str]

    def once(self) -> Generator[Annotated, None, None]:
        """Yield this rank's part of them, each photo once."""
