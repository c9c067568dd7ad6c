"""What the reader hands over: photos as a transform made them, and what is to be learned of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class LabelledBatch:
    """Some photos, on the host or on a device.

    images: (B, 3, S, S) float32. labels: int64, (B,), or (B, S, S) of masks. numbers: (B,) int64, of the photos in
    their index, always on the host.
    """

    images: torch.Tensor
    labels: torch.Tensor
    epoch: int
    numbers: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device) -> LabelledBatch:
        """Return the same batch on a device; from pinned memory the copies run beside what the host does next."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> LabelledBatch:
        """Return the same batch in pinned memory."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all that lies on the batch's device."""
        yield self.images
        yield self.labels

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> LabelledBatch:
        return replace(self, images=change(self.images), labels=change(self.labels))
