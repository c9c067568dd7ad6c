"""Classification: labelled photos, a classifier on a pretrained encoder, and how many it gets right."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tec_cache.device import Compute
from tec_cache.distributed import Ranks
from tec_cache.finetune.classifier import Classifier
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.finetune.groups import parameter_groups
from tec_cache.finetune.mixing import soft_target_loss, soft_targets
from tec_cache.finetune.optimizers import create_optimizer
from tec_cache.finetune.recipes import FinetuneRecipe
from tec_cache.printable import counted
from tec_cache.rng import key64
from tec_cache.run.micro_batches import count_micro_batches
from tec_cache.tasks.photos import Annotated, Judged, Learned

TOP = 5
MOST_AT_ONCE = 256
"""Photos of a micro-batch on a GPU unless another is asked for: 19 GB of a ViT-B at 224 pixels in bfloat16."""


class Classify:
    """A classifier, the photos that it learns from, and those that it is judged on.

    recipe: says how images are mixed where the config's alphas do not say that they are not.
    """

    name: str = "classify"
    draws: bool = True
    terms: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        config: FinetuneConfig,
        recipe: FinetuneRecipe,
        model: Classifier,
        learned: Learned,
        judged: Judged,
        compute: Compute,
        ranks: Ranks,
    ) -> None:
        self.config, self.compute, self.ranks = config, compute, ranks
        self.judged_every = config.judge_every
        self.learned, self.judged = learned, judged
        self.mixing = replace(recipe, mixup=config.mixup, cutmix=config.cutmix, smoothing=config.smoothing)
        self.classifier = model.to(compute.device)
        self.module: nn.Module = self.classifier
        self.micro_batches = count_micro_batches(config, ranks)
        self.steps_per_epoch = learned.steps_per_epoch
        if config.checkpointing:
            model.vit.set_grad_checkpointing(True)

    def batches(self, start_step: int, stop_step: int) -> Generator[Annotated, None, None]:
        """Yield this rank's batches of steps start..stop, counted over all epochs."""
        return self.learned.batches(start_step, stop_step, micro_batches=self.micro_batches)

    def losses(self, model: nn.Module, batch: Annotated) -> dict[str, torch.Tensor]:
        """Return the cross entropy against labels that are smoothed, and mixed as the images are."""
        drawn = key64("batch", batch.epoch, *batch.numbers.tolist())
        images, targets = soft_targets(
            batch.images,
            batch.labels,
            self.mixing,
            num_classes=self.classifier.num_classes,
            seed=self.config.seed,
            step=drawn,
            rank=self.ranks.rank,
        )
        return {"loss": soft_target_loss(model(images), targets)}

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Create the optimizer of the recipe over groups with their shares of the learning rate."""
        config = self.config
        groups = parameter_groups(
            self.classifier,
            weight_decay=config.weight_decay,
            layer_decay=1.0 if config.layer_decay is None else config.layer_decay,
        )
        return create_optimizer(
            config.optimizer,  # type: ignore[arg-type]
            groups,
            lr=lr,
            momentum=0.0 if config.momentum is None else config.momentum,
            betas=(config.beta1, config.beta2),
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return loss, top-1 and top-5 accuracy (0 to 1) on the photos that are judged, each counted once."""
        counts = torch.zeros(4, dtype=torch.float64)
        top = min(TOP, self.classifier.num_classes)
        with closing(self.judged.once()) as batches:
            for host in batches:
                batch = host.to(self.compute.device)
                logits = model(batch.images).float()
                hits = logits.topk(top, dim=1).indices == batch.labels[:, None]
                loss = cross_entropy(logits, batch.labels, reduction="sum")
                found = torch.stack([loss, hits[:, 0].sum(), hits.sum()]).double().cpu()
                counts += torch.cat([torch.tensor([float(len(batch))], dtype=torch.float64), found])
        if self.ranks.world_size > 1:
            counts = counts.to(self.compute.device)
            torch.distributed.all_reduce(counts)
        total, loss, first, among = counts.tolist()
        scores = {"test_loss": loss / total, "test_top1": first / total}
        return scores | ({f"test_top{TOP}": among / total} if top == TOP else {}) | {"test_images": total}

    def figures(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def note(self) -> str:
        """Say how many broken photos were met."""
        broken = len(self.learned.damaged | self.judged.damaged)
        return counted(broken, "broken photo") if broken else ""
