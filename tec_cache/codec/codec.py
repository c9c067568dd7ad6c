"""What every codec gives: targets become small arrays, and come back.

A codec is a frozen object that `get_codec` makes. Its contract:

- `arrays(spec)` names the arrays it stores per view, with the shape and dtype of one row.
- `encode(targets, spec)` takes *normalized* targets of a batch (any device) and gives those arrays, batch first.
  A value that it cannot hold is an error, never a silent clip.
- `decode(arrays, spec)` takes the same arrays as tensors on any device and gives float32 `Targets`. It needs
  nothing but what `to_bytes` wrote down.
- Attention logits are stored without the mean of each row, which the softmax removes anyway: they come back
  up to a constant per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from tec_cache.types import Targets, TargetSpec


ZSTD_LEVEL = 1
"""Blosc's, and zstd's own. Codes lie sorted and bit-shuffled, which leaves little for a longer search to find: 7 (zstd
13, in blocks of 128 KiB) takes 2 % fewer bytes of ViT-S/14 codes and 18 times the CPU, 2 to 6 more of both than 1 does.
No part of a target set's identity: a frame says how it is read, so that a cache may be finished at another level."""


class ArraySpec(NamedTuple):
    """One stored array: a row's shape (without the batch) and dtype, and how a block of rows is compressed."""

    shape: tuple[int, ...]
    dtype: str
    order: tuple[int, ...] = ()
    """Order in which the axes of a block (0: the rows) are laid out; empty: as they are. Zarr's `transpose`."""
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"] = "bitshuffle"
    split: int = 0
    """Blosc's block size in bytes; 0: its own choice."""
    dimensions: tuple[str, ...] = ()
    """Names of the row's axes, for whoever opens the stored array by itself."""


class Codec(Protocol):
    """See the module's docstring."""

    name: str

    def arrays(self, spec: TargetSpec) -> dict[str, ArraySpec]:
        """Name the stored arrays."""

    def encode(self, targets: Targets, spec: TargetSpec) -> dict[str, npt.NDArray[np.generic]]:
        """Turn normalized targets into arrays."""

    def decode(self, arrays: dict[str, torch.Tensor], spec: TargetSpec) -> Targets:
        """Turn arrays into float32 targets."""

    def to_bytes(self) -> bytes | None:
        """Return the fitted parameters from which `get_codec` makes the codec again; None for none."""


def most_parameter_bytes(spec: TargetSpec) -> int:
    """Return how many bytes the fitted parameters of any codec for such targets can have.

    Each tensor has a mean, two bases, and at most two numbers for every coefficient; of attention, one basis spans the
    heads or all rows, whatever has at most 1,024 channels.
    """
    widths = (spec.channels, max(1024, spec.num_heads))
    return 65_536 + sum(4 * (width + 2 * width**2 + 3 * spec.num_tokens * width) for width in widths)
