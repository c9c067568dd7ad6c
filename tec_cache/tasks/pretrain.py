"""Pretraining: a student that sees a quarter of the patches predicts targets of all of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from tec_cache.cache.reader import Cache
from tec_cache.config import TrainConfig
from tec_cache.device import Compute, default_workers
from tec_cache.distributed import Ranks
from tec_cache.loader import Batch, Loader
from tec_cache.printable import counted
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.run.micro_batches import count_micro_batches
from tec_cache.student.masking import mask_noise, random_mask
from tec_cache.student.model import Student, term
from tec_cache.tasks.gradients import SetGradients, gradient_norms, is_measured
from tec_cache.tasks.targets import Sources


@dataclass(frozen=True)
class MaskedBatch:
    """Some views and the noise of their masks.

    noise: (M B, L) float32, M masks for each of B views; row m B + i is mask m of view i.
    """

    views: Batch
    noise: torch.Tensor
    measured: bool = False
    """Whether the gradients of the sets are measured on it."""

    def __len__(self) -> int:
        return len(self.views)

    def to(self, device: torch.device) -> MaskedBatch:
        """Return the same batch on a device; from pinned memory the copies run beside what the host does next."""
        return MaskedBatch(self.views.to(device), self.noise.to(device, non_blocking=True), self.measured)

    def rows(self, count: int) -> MaskedBatch:
        """Return the first rows. ValueError for a batch of several masks, whose noise is of all views in turn."""
        if len(self.noise) != len(self):
            raise ValueError(f"{counted(len(self.noise), 'mask')} of {counted(len(self), 'view')}")
        return MaskedBatch(self.views.rows(count), self.noise[:count])

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all that lies on the batch's device."""
        yield from self.views.tensors()
        yield self.noise


def noise_of(views: Batch, num_tokens: int, *, seed: int, masks: int = 1, pin_memory: bool = False) -> torch.Tensor:
    """Return the noise of each view's masks, as in `MaskedBatch`: a function of (seed, epoch, sample, mask number)."""
    noise = torch.empty(masks * len(views), num_tokens, pin_memory=pin_memory)
    for mask, part in enumerate(noise.view(masks, len(views), num_tokens)):
        part.copy_(mask_noise(views.sample_keys, seed=seed, epoch=views.epoch, num_tokens=num_tokens, mask_number=mask))
    return noise


MOST_AT_ONCE = 512
"""Views of a micro-batch on a GPU unless another is asked for: 23 GB of a ViT-B's pretraining in bfloat16, and less
than 80 GB of a ViT-L's. Beyond some hundred a larger one is not faster."""

Judge = Callable[[Student], dict[str, float]]
"""Says how good a student is, as scores by name, and leaves it as it is; every rank calls it, all get the same."""


class Pretrain:
    """A student, the crops of a cache, and the targets that one source gives, or several.

    judge: asked every `probe_every` epochs of the config, where there is one.
    """

    name: str = "pretrain"
    draws: bool = False

    def __init__(
        self,
        config: TrainConfig,
        cache: Cache,
        sources: Sources,
        student: Student,
        compute: Compute,
        ranks: Ranks,
        judge: Judge | None = None,
    ) -> None:
        self.config, self.sources, self.student = config, dict(sources), student.to(compute.device)
        self.judge = judge
        self.judged_every: int = (config.probe_every or 0) if judge is not None else 0
        self.size = int(student.encoder.patch_embed.img_size[0])
        self.micro_batches = count_micro_batches(config, ranks)
        self.tokens, self.pinned = cache.grid**2, compute.device.type == "cuda"
        sizes = {self.size} | {source.pixel_size for source in sources.values() if source.pixel_size}
        self.loader: Loader[MaskedBatch] = Loader(
            cache,
            [source.stored for source in sources.values() if source.stored is not None],
            batch_size=config.batch_size // config.masks_per_view,
            pixel_sizes=tuple(sorted(sizes)),
            num_views=config.views,
            shuffle_buffer=config.shuffle_buffer,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=config.workers or default_workers(compute.device, ranks.local_world_size),
            pin_memory=self.pinned,
            skip_damage=config.on_error == "skip",
            finish=self.masked,
        )
        self.module: nn.Module = self.student
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.weights: dict[str, dict[str, float]] = {name: {} for name in sources}
        """Set -> name of a loss -> its weight among that set's."""
        for name, head in student.each():
            self.weights[name][term(name, head.kind)] = float(getattr(config, f"{head.kind}_weight"))
        self.terms: tuple[str, ...] = ("loss", *(loss for of_set in self.weights.values() for loss in of_set))
        self.gradients: SetGradients | None = None
        if len(sources) > 1:
            self.gradients = SetGradients({n: s.weight for n, s in sources.items()}, ranks, student.gradient_norms)

    def masked(self, views: Batch) -> MaskedBatch:
        """Add the noise of each view's masks."""
        config = self.config
        noise = noise_of(views, self.tokens, seed=config.seed, masks=config.masks_per_view, pin_memory=self.pinned)
        return MaskedBatch(views, noise)

    def batches(self, start_step: int, stop_step: int) -> Generator[MaskedBatch, None, None]:
        """Yield this rank's batches of steps start..stop, counted over all epochs."""
        with closing(self.loader.batches(start_step, stop_step, micro_batches=self.micro_batches)) as batches:
            for number, batch in enumerate(batches):
                step, part = divmod(number, self.micro_batches)
                measured = (
                    self.gradients is not None and part == 0 and is_measured(start_step + step, self.config.balance)
                )
                yield replace(batch, measured=True) if measured else batch

    def losses(self, model: nn.Module, batch: MaskedBatch) -> dict[str, torch.Tensor]:
        """Return the losses of one micro-batch, their weighted sum under "loss"."""
        images = batch.views.images(self.size, IMAGENET_MEAN, IMAGENET_STD)
        targets = {name: source.targets(batch.views, images) for name, source in self.sources.items()}
        if self.gradients is not None and batch.measured:
            mask = random_mask(batch.noise, self.student.mask_ratio)
            self.gradients.add(gradient_norms(self.student, images, targets, mask, self.weights))
        losses: dict[str, torch.Tensor] = model(images, targets, noise=batch.noise)
        factors = (
            self.gradients.factors() if self.gradients is not None else {n: s.weight for n, s in self.sources.items()}
        )
        first, *others = (
            factors[name] * weight * losses[loss]
            for name, of_set in self.weights.items()
            for loss, weight in of_set.items()
        )
        return {"loss": sum(others, first), **losses}

    def figures(self) -> dict[str, float]:
        """Return the norms of the sets' gradients where they were measured since the last line."""
        return {} if self.gradients is None else self.gradients.figures()

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """AdamW in one kernel; no decay on biases, norms and other 1-D parameters. Frozen ones are left out."""
        groups = param_groups_weight_decay(self.student, self.config.weight_decay)
        return torch.optim.AdamW(groups, lr=lr, betas=(self.config.beta1, self.config.beta2), fused=True)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the judge's scores of the student, not of the losses, which say little of its features."""
        return {} if self.judge is None else self.judge(self.student)

    def note(self) -> str:
        """Say how many damaged blocks were met, and which set's gradient dwarfs another's."""
        damaged = counted(len(self.loader.damaged), "damaged block") if self.loader.damaged else ""
        return ", ".join(filter(None, (damaged, "" if self.gradients is None else self.gradients.note())))

    def target_errors(self) -> dict[str, float]:
        """Return by how much coding may lower each set's feature loss: what it left out need not be predicted.

        By the set's name, the squared error of what is left out, where targets have a mean square of about 1.
        """
        stored = [s.stored for s in self.sources.values() if s.spec.normalization != "none" and s.stored is not None]
        errors = {target.name: target.codec_record.errors.get("mse") for target in stored}
        return {name: error for name, error in errors.items() if error is not None}
