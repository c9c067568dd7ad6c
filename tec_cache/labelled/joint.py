"""Transforms that move a photo and its mask together: torchvision's, which knows masks from pictures."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tec_cache.labelled.masked import MaskTransform
from tec_cache.labelled.transforms import Pixels
from tec_cache.mask_values import NO_CLASS

Statistics = tuple[float, float, float]

SHORTER = 256 / 224
"""Shorter side of a photo that is judged whole, of the training size."""
MOST_OF_A_CLASS, TRIES = 0.75, 10
"""Share of a jittered crop that one class may have, and how often a better crop is looked for."""
_BLUR = 13
"""Pixels of the blur's kernel: three deviations of the strongest to either side."""


def joint_transform(
    size: int,
    *,
    mean: Statistics,
    std: Statistics,
    crop: str,
    crop_scale: tuple[float, float],
    jitter: tuple[float, float],
    colour: tuple[float, float, float, float] | None,
    grey: float,
    blur: float,
) -> MaskTransform:
    """Return an augmentation: square crops of `size` pixels, bilinear, masks by the nearest pixel; half are mirrored.

    The other arguments are a recipe's: see `segment.recipes.SegmentRecipe`.
    """
    cut: Any = v2.RandomResizedCrop(size, crop_scale, antialias=True)
    if crop == "jittered":
        cut = JitteredCrop(size, jitter)
    parts: list[Any] = [cut, v2.RandomHorizontalFlip()]
    if colour is None:
        parts.append(v2.RandomPhotometricDistort())
    else:
        parts.append(v2.RandomApply([v2.ColorJitter(*colour)], p=0.8))
    if grey:
        parts.append(v2.RandomGrayscale(grey))
    if blur:
        parts.append(v2.RandomApply([v2.GaussianBlur(_BLUR, (0.1, 2.0))], p=blur))
    return _Joint(v2.Compose(parts), mean, std)


class JitteredCrop(torch.nn.Module):
    """Scale a photo so that its shorter side is `jitter` times the size, and cut a square, padded where it is small."""

    def __init__(self, size: int, jitter: tuple[float, float]) -> None:
        super().__init__()
        self.size, self.jitter = size, jitter

    def forward(self, image: Image.Image, mask: tv_tensors.Mask) -> tuple[Image.Image, tv_tensors.Mask]:
        """Return the parts of both."""
        low, high = self.jitter
        shorter = max(1, round(self.size * (low + (high - low) * float(torch.rand(())))))
        image, mask = F.resize(image, [shorter], antialias=True), F.resize(mask, [shorter])
        right, below = max(0, self.size - image.width), max(0, self.size - image.height)
        image, mask = F.pad(image, [0, 0, right, below]), F.pad(mask, [0, 0, right, below], fill=NO_CLASS)
        for _ in range(TRIES):
            top = int(torch.randint(0, image.height - self.size + 1, ()))
            left = int(torch.randint(0, image.width - self.size + 1, ()))
            part = F.crop(mask, top, left, self.size, self.size)
            counts = torch.bincount(part[part != NO_CLASS].long())
            if counts.numel() > 1 and counts.max() < MOST_OF_A_CLASS * counts.sum():
                break
        return F.crop(image, top, left, self.size, self.size), part


class _Joint:
    """Applies a transform to a photo and its classes, and makes both tensors."""

    def __init__(self, transform: Any, mean: Statistics, std: Statistics) -> None:
        self.transform = transform
        self.pixels = Pixels(mean, std)

    def __call__(self, image: Image.Image, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask: Any = tv_tensors.Mask(classes)
        if mask.shape != (image.height, image.width):
            mask = F.resize(mask, [image.height, image.width])
        image, mask = self.transform(image, mask)
        return self.pixels(image), mask.as_subclass(torch.Tensor).long()


def whole_transform(size: int, patch: int, *, whole: bool, mean: Statistics, std: Statistics) -> MaskTransform:
    """Return the transform of judging: all of the photo, scaled; the mask stays as it is.

    size: pixels of training. whole: the photo is seen at once, its shorter side 256 / 224 of the training size and both
    sides multiples of the patch; else in windows, its shorter side the training size.
    """
    pixels = Pixels(mean, std)
    unit = patch if whole else 1
    shorter = round(size * SHORTER / patch) * patch if whole else size

    def transform(image: Image.Image, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = shorter / min(image.width, image.height)
        height, width = (max(shorter, round(edge * scale / unit) * unit) for edge in (image.height, image.width))
        return pixels(F.resize(image, [height, width], antialias=True)), classes.long()

    return transform
