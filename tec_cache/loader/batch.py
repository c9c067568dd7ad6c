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
    """Some views, on the host or on a device.

    pixels: size -> (B, size, size, 3) uint8, for each size asked for. codes: name of a target set -> its arrays, batch
    first. labels: (B,) int64, -1 where a photo has none. sample_keys: (B,) uint64, a function of (source shard, key),
    always on the host.
    """

    epoch: int
    pixels: dict[int, torch.Tensor]
    codes: dict[str, dict[str, torch.Tensor]]
    labels: torch.Tensor
    sample_keys: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.sample_keys)

    def images(self, size: int, mean: Colours, std: Colours) -> torch.Tensor:
        """Return images (B, 3, size, size) float32, normalized by the mean and deviation of values from 0 to 1."""
        images = self.pixels[size].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return normalized(images, mean, std)

    def names(self, cache: Cache) -> list[SampleName]:
        """Return source shard and key of each row; cache: the one it was loaded from. Raises CacheError for another."""
        return names_of(cache, self.sample_keys)

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on a device; from pinned memory the copies run beside what the host does next."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, count: int) -> Batch:
        """Return the first rows."""
        return replace(self._mapped(lambda tensor: tensor[:count]), sample_keys=self.sample_keys[:count])

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all that lies on the batch's device."""
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
