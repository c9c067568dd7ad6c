"""From a photo to the class of each of its pixels. `forward` is called by itself: photos have all sizes, and where the
training is compiled, each would be compiled anew."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from tec_cache.segment.model import Segmenter

STRIDE = 2 / 3
"""From one window to the next, of the window: 341 of 512 pixels."""


def predict(model: Segmenter, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the most likely classes, (B, *size) int64; images: (B, 3, H, W) as `joint.evaluation_transform` gives."""
    logits = whole(model, images) if model.kind == "linear" else windows(model, images)
    return interpolate(logits.float(), size=size, mode="bilinear", align_corners=False).argmax(dim=1)


def whole(model: Segmenter, images: Tensor) -> Tensor:
    """Return the logits of images that are seen at once."""
    out: Tensor = model.forward(images)  # type: ignore[assignment]
    return out


def windows(model: Segmenter, images: Tensor) -> Tensor:
    """Return the mean logits of overlapping windows of the training size, (B, classes, H, W)."""
    size, (height, width) = model.input_size, images.shape[2:]
    images = pad(images, (0, max(0, size - width), 0, max(0, size - height)))
    total = images.new_zeros(len(images), model.num_classes, *images.shape[2:], dtype=torch.float32)
    seen = images.new_zeros(1, 1, *images.shape[2:], dtype=torch.float32)
    for top in starts(images.shape[2], size):
        for left in starts(images.shape[3], size):
            part = slice(None), slice(None), slice(top, top + size), slice(left, left + size)
            logits: Tensor = model.forward(images[part])  # type: ignore[assignment]
            total[part] += interpolate(logits.float(), size=(size, size), mode="bilinear", align_corners=False)
            seen[part] += 1
    return (total / seen)[:, :, :height, :width]


def starts(edge: int, size: int) -> list[int]:
    """Return where windows begin on an edge: as few as lie no further apart than the stride, the last at its end."""
    stride = round(size * STRIDE)
    count = max(0, -(-(edge - size) // stride)) + 1
    return [min(i * stride, edge - size) for i in range(count)]
