"""How well masks are predicted: from counts of pixels to intersection over union."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def confusion(classes: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count pixels by class and predicted class, (num_classes, num_classes) int64 with a row for each class.

    classes, predicted: int64 of one shape; pixels of a class below zero are left out.
    """
    known = classes >= 0
    pairs = classes[known] * num_classes + predicted[known]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """What counts of pixels say; shares from 0 to 1."""

    iou: tuple[float | None, ...]
    """Intersection over union of each class; None where neither a mask nor a prediction has it."""
    accuracy: tuple[float | None, ...]
    """Share of each class's pixels that are right; None where no mask has it."""
    pixels: tuple[int, ...]
    """Of each class in the masks."""
    mean_iou: float
    """Over all classes of which there is a number."""
    pixel_accuracy: float
    mean_accuracy: float

    @classmethod
    def of(cls, counts: Tensor) -> Scores:
        """Read counts as `confusion` makes them; of several photos they are added up first. ValueError for none."""
        table = counts.double().cpu()
        right, true, said = table.diagonal(), table.sum(dim=1), table.sum(dim=0)
        if not table.sum():
            raise ValueError("there is no pixel of a known class")
        union = true + said - right
        iou = [float(r / u) if u else None for r, u in zip(right, union, strict=True)]
        accuracy = [float(r / t) if t else None for r, t in zip(right, true, strict=True)]
        return cls(
            iou=tuple(iou),
            accuracy=tuple(accuracy),
            pixels=tuple(int(t) for t in true),
            mean_iou=_mean(iou),
            pixel_accuracy=float(right.sum() / table.sum()),
            mean_accuracy=_mean(accuracy),
        )


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)
