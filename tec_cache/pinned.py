"""Pinned host memory without torch's rounding: copies from it to a GPU, and back, run beside everything else.

torch rounds each allocation of pinned memory up to a power of two, and keeps it: 38.5 MB of pixels take 67. Here
tensors share slabs that are powers of two already. A slab is torch's own allocation, so torch still knows when the
last copy from it is done, and gives it out again only then.
"""

from __future__ import annotations

import math
import threading

import torch

ALIGNMENT = 512
"""Bytes; what torch's own allocations on a device are aligned to."""
PIECES = 2
"""A slab holds at least so many of the largest tensors: what is left at its end is less than a piece."""


class PinnedSlabs:
    """Hands out uninitialized pinned tensors, side by side in slabs; any thread may ask.

    A slab lives as long as any of its tensors, so ask it for what is used up in about the order in which it is made.
    Memory beside the tensors: less than one of them at the end of each slab, and up to two slabs that are partly used.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._size = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized, contiguous tensor in pinned memory."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            if self._used + size > len(self._slab):
                self._size = max(self._size, _power_of_two(PIECES * size))
                self._slab, self._used = torch.empty(self._size, dtype=torch.uint8, pin_memory=True), 0
            part = self._slab[self._used : self._used + size]
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return part.view(dtype).view(shape)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
