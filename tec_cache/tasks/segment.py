"""Segmentation: photos with masks, a head on a pretrained encoder, and how well it finds the classes' pixels."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from tec_cache.device import Compute
from tec_cache.distributed import Ranks
from tec_cache.errors import SourceError
from tec_cache.mask_values import NO_CLASS
from tec_cache.printable import counted
from tec_cache.run.micro_batches import count_micro_batches
from tec_cache.segment.config import SegmentConfig
from tec_cache.segment.groups import parameter_groups
from tec_cache.segment.model import Segmenter
from tec_cache.segment.predict import predict
from tec_cache.segment.scores import Scores, confusion
from tec_cache.tasks.photos import Annotated, Judged, Learned
from tec_cache.urls import without_secrets

AUXILIARY_WEIGHT = 0.4
"""Of the loss of UPerNet's auxiliary head."""


MOST_AT_ONCE = {"linear": 128, "upernet": 16}
"""Head -> photos of a micro-batch on a GPU unless another is asked for: 14 GB of a ViT-B at 224 pixels, 22 GB at 512
pixels under UPerNet, in bfloat16."""


class Writer(Protocol):
    """Takes predictions as they are made."""

    def write(self, number: int, classes: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> None:
        """Take those of a photo; classes, predicted: (H, W)."""


class Segment:
    """A segmenter, the photos that it learns from, and those that it is judged on."""

    name: str = "segment"
    draws: bool = True
    terms: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        config: SegmentConfig,
        model: Segmenter,
        learned: Learned,
        judged: Judged,
        compute: Compute,
        ranks: Ranks,
    ) -> None:
        self.config, self.compute, self.ranks = config, compute, ranks
        self.learned, self.judged = learned, judged
        self.judged_every = config.judge_every
        if ranks.world_size > 1 and compute.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.segmenter = model.to(compute.device)
        self.module: nn.Module = self.segmenter
        self.micro_batches = count_micro_batches(config, ranks)
        self.steps_per_epoch = learned.steps_per_epoch
        self.writer: Writer | None = None
        """Where predictions are written as they are judged."""
        self.scores: Scores | None = None
        """Of the last judgement."""
        if config.checkpointing:
            model.vit.set_grad_checkpointing(True)

    def batches(self, start_step: int, stop_step: int) -> Generator[Annotated, None, None]:
        """Yield this rank's batches of steps start..stop, counted over all epochs."""
        return self.learned.batches(start_step, stop_step, micro_batches=self.micro_batches)

    def losses(self, model: nn.Module, batch: Annotated) -> dict[str, Tensor]:
        """Return the cross entropy over all pixels of known classes."""
        out: Any = model(batch.images)
        if not isinstance(out, tuple):
            return {"loss": pixel_loss(out, batch.labels)}
        logits, auxiliary = (interpolate(o.float(), size=batch.labels.shape[1:], mode="bilinear") for o in out)
        return {"loss": pixel_loss(logits, batch.labels) + AUXILIARY_WEIGHT * pixel_loss(auxiliary, batch.labels)}

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """AdamW in one kernel, the encoder's layers with their shares of the learning rate."""
        config = self.config
        decay = 1.0 if config.layer_decay is None else config.layer_decay
        groups = parameter_groups(self.segmenter, weight_decay=config.weight_decay, layer_decay=decay)
        made = torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), fused=True)
        for group in made.param_groups:
            group["initial_lr"] = group["lr"]
            group["lr"] *= group["lr_scale"]
        return made

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return mean IoU, pixel accuracy and mean accuracy of classes (0 to 1), each photo counted once.

        Raises SourceError where no pixel of the masks is of a known class.
        """
        count = self.segmenter.num_classes
        table = torch.zeros(count, count, dtype=torch.int64, device=self.compute.device)
        photos = torch.zeros((), dtype=torch.int64, device=self.compute.device)
        with closing(self.judged.once()) as batches:
            for host in batches:
                batch = host.to(self.compute.device)
                height, width = batch.labels.shape[1:]
                predicted = predict(self.segmenter, batch.images, (height, width))
                table += confusion(batch.labels, predicted, count)
                photos += len(batch)
                if self.writer is not None:
                    for number, classes, found in zip(batch.numbers, batch.labels, predicted, strict=True):
                        self.writer.write(int(number), classes.cpu().numpy(), found.cpu().numpy())
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(table)
            torch.distributed.all_reduce(photos)
        if not photos:
            broken = next(iter(sorted(self.judged.damaged)), "another rank has named them")
            raise SourceError(f"every photo to be judged on is broken; one: {broken}", where=self._judged_on)
        if not table.sum():
            raise SourceError(
                "no pixel of the masks to be judged on is of a known class",
                where=self._judged_on,
                todo="is --ignore the value that means that nothing is known?",
            )
        self.scores = scores = Scores.of(table)
        return {
            "test_miou": scores.mean_iou,
            "test_pixel_accuracy": scores.pixel_accuracy,
            "test_mean_accuracy": scores.mean_accuracy,
            "test_images": float(photos),
        }

    @property
    def _judged_on(self) -> str:
        return without_secrets(self.config.test or self.config.train)

    def figures(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def note(self) -> str:
        """Say how many broken photos were met."""
        broken = len(self.learned.damaged | self.judged.damaged)
        return counted(broken, "broken photo") if broken else ""


def pixel_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the mean cross entropy of pixels of known classes, at the logits' size; 0 where there are none.

    logits: (B, C, h, w). classes: (B, H, W) int64; where sizes differ, the pixel at each logit's centre is taken.
    torch's plain "nearest" takes the one at its corner, and what is learned so lies half a logit beside the photo.
    """
    if classes.shape[1:] != logits.shape[2:]:
        picked = interpolate(classes[:, None].float(), size=logits.shape[2:], mode="nearest-exact")
        classes = picked[:, 0].long()
    total = cross_entropy(logits.float(), classes, ignore_index=NO_CLASS, reduction="sum")
    return total / (classes != NO_CLASS).sum().clamp(min=1)
