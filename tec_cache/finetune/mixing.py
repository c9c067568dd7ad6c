"""Labels as distributions: smoothed, and mixed where images are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from timm.data.mixup import Mixup, mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from tec_cache.errors import ConfigError
from tec_cache.finetune.recipes import FinetuneRecipe
from tec_cache.printable import counted
from tec_cache.rng import key64

_LOSS = SoftTargetCrossEntropy()


def soft_targets(
    images: Tensor, labels: Tensor, recipe: FinetuneRecipe, *, num_classes: int, seed: int, step: int, rank: int
) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, S, S) and target distributions (B, num_classes) float32, mixed as the recipe says.

    images: float; left as they are. labels: (B,) int64. What is drawn is a function of (seed, step, rank); numpy's
    generator, which timm draws from, is left as it was. Raises ConfigError for an odd number of images to mix.
    """
    if not recipe.mixes:
        return images, mixup_target(labels, num_classes, smoothing=recipe.smoothing)
    if len(images) % 2:
        raise ConfigError(
            f"{counted(len(images), 'image')} cannot be mixed in pairs",
            todo="give an even --batch-size for every process",
        )
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)
    with _numpy_seeded(key64("mixup", seed, step, rank)):
        mixed, targets = mixup(images.clone(), labels)
    return mixed, targets


def soft_target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of logits (B, N) against distributions (B, N), a float32 scalar: mean over the batch."""
    loss: Tensor = _LOSS(logits.float(), targets)
    return loss


@contextmanager
def _numpy_seeded(key: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    try:
        yield
    finally:
        np.random.set_state(state)
