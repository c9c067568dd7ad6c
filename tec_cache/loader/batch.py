"""What the loader hands over: some rows of the cache, still as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tec_cache.cache.finding import SampleName, names_of
from tec_cache.cache.reader import Cache
from tec_cache.pixels import normalized
from tec_cache.types import Colours


@dataclass(frozen=True)
class Batch:
    """Some views with their stored targets, on the host or on a device."""

    epoch: int
    """The epoch from which the views come."""
    pixels: dict[int, torch.Tensor]
    """Size -> (B, size, size, 3) uint8, for each size that was asked for."""
    codes: dict[str, dict[str, torch.Tensor]]
    """Name of a target set -> its stored arrays, batch first; `TargetSet.decode` makes targets of them."""
    labels: torch.Tensor
    """(B,) int64, -1 if a photo has no label."""
    sample_keys: npt.NDArray[np.uint64]
    """(B,) uint64: a hash of each photo's source shard and key, always on the host; `names` gives both."""

    def __len__(self) -> int:
        return len(self.sample_keys)

    def images(self, size: int, mean: Colours, std: Colours) -> torch.Tensor:
        """Return images (B, 3, size, size) float32, normalized by the mean and deviation of values from 0 to 1."""
        images = self.pixels[size].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return normalized(images, mean, std)

    def names(self, cache: Cache) -> list[SampleName]:
        """Return source shard and key of each row. cache: the one it was loaded from; CacheError for another."""
        return names_of(cache, self.sample_keys)

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on a device; copies from pinned memory run in the background."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, count: int) -> Batch:
        """Return the first `count` rows."""
        return replace(self._mapped(lambda tensor: tensor[:count]), sample_keys=self.sample_keys[:count])

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all tensors on the batch's device."""
        yield from self.pixels.values()
        for arrays in self.codes.values():
            yield from arrays.values()
        yield self.labels

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            pixels={size: change(values) for size, values in self.pixels.items()},
            codes={
                target: {name: change(values) for name, values in arrays.items()}
                for target, arrays in self.codes.items()
            },
            labels=change(self.labels),
        )
