"""Pixels as models take them: everything that a model sees has gone through `normalized`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tec_cache.types import Colours


def normalized(images: Tensor, mean: Colours, std: Colours) -> Tensor:
    """Turn images (..., 3, H, W) float32 from 0 to 255 into (images / 255 - mean) / std, in place; return them."""
    device = images.device
    return images.div_(255).sub_(_per_channel(mean, device)).div_(_per_channel(std, device))


@functools.cache
def _per_channel(values: Colours, device: torch.device) -> Tensor:
    """Return (3, 1, 1) float32; made once, because copying it waits for the device."""
    return torch.tensor(values, device=device)[:, None, None]
