"""The transforms of tuning and of judging: timm's, with what the recipes set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, RandAugment
from timm.data.transforms import MaybeToTensor
from torchvision.transforms import Normalize

from tec_cache.pixels import normalized

Transform = Callable[[Image.Image], torch.Tensor]
"""From an upright RGB photo to (3, S, S) float32. What it draws comes from Python's, numpy's and torch's global
generators, which are set for each photo; from others it would not come twice the same."""

CENTER_CROP = 0.875
"""Share of the shorter side that is judged, up to CROPPED_SIZE: photos are resized to 256 for 224."""
CROPPED_SIZE = 224
"""Pixels. What is judged on larger photos sees all of the shorter side."""


def train_transform(
    size: int,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float | None = None,
    erase: float = 0.25,
    erase_mode: str = "pixel",
    interpolation: str = "bicubic",
) -> Transform:
    """Return the augmentation of full fine-tuning, whose defaults are MAE's (and BEiT's and DeiT's).

    size: pixels of the square that is cut. scale, ratio: of the photo's area, and width to height. flip, erase:
    probabilities. auto_augment: as timm writes it; None for none. color_jitter: None for none; timm leaves it out
    beside a RandAugment.
    """
    transform = create_transform(
        size,
        is_training=True,
        scale=scale,
        ratio=ratio,
        hflip=flip,
        color_jitter=color_jitter,  # type: ignore[arg-type]
        auto_augment=auto_augment,
        interpolation=interpolation,
        mean=mean,
        std=std,
        re_prob=erase,
        re_mode=erase_mode,
        re_count=1,
    )
    for part in transform.transforms:
        for operation in part.ops if isinstance(part, RandAugment) else ():
            keep_zero_bits(operation)
    return with_fast_pixels(transform)


def with_fast_pixels(transform: Any) -> Transform:
    """Let one step do what ToTensor and Normalize do in a composed transform, to the bit and in half of their time."""
    parts, at = transform.transforms, 0
    while at + 1 < len(parts):
        if isinstance(parts[at], MaybeToTensor) and isinstance(parts[at + 1], Normalize):
            parts[at : at + 2] = [Pixels(parts[at + 1].mean, parts[at + 1].std)]
        at += 1
    made: Transform = transform
    return made


class Pixels:
    """From an RGB picture to (3, H, W) float32, (value / 255 - mean) / std."""

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = ((float(red), float(green), float(blue)) for red, green, blue in (mean, std))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the pixels."""
        width, height = image.size
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
        out = torch.empty(3, height, width)
        out.copy_(pixels.permute(2, 0, 1))
        return normalized(out, self.mean, self.std)


def keep_zero_bits(operation: AugmentOp) -> None:
    """Let a posterization of timm's go down to no bit at all, as its recipes were made with.

    Of magnitude 9 with a deviation of 0.5, one in 44 does: older Pillows made those photos black, and Pillow 13 raises
    ValueError, which would end a run within some thousand photos.
    """
    if operation.name.startswith("Posterize"):
        operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def probe_transform(
    size: int,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    scale: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    interpolation: str = "bicubic",
) -> Transform:
    """Return MAE's augmentation of a linear probe: a random part of the photo, mirrored or not."""
    return train_transform(
        size,
        mean=mean,
        std=std,
        scale=scale,
        flip=flip,
        auto_augment=None,
        erase=0.0,
        interpolation=interpolation,
    )


def evaluation_transform(
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    crop: float | None = None,
    interpolation: str = "bicubic",
) -> Transform:
    """Return the transform of judging: resize, and cut the middle.

    crop: share of the shorter side; None: 0.875 up to 224 pixels, above that all of it.
    """
    if crop is None:
        crop = CENTER_CROP if size <= CROPPED_SIZE else 1.0
    transform = create_transform(
        size, is_training=False, interpolation=interpolation, mean=mean, std=std, crop_pct=crop
    )
    return with_fast_pixels(transform)
