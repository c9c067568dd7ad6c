"""The training loop: what one run holds in memory, one step of it, and when it logs, saves and stops."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.target_sources import OnlineTargets, TargetSource
from tec_cache.cache.reader import Cache
from tec_cache.config import TrainConfig
from tec_cache.device import Compute, default_workers
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, NonFiniteError, TecCacheError
from tec_cache.loader import Batch, Loader, on_device
from tec_cache.progress import Progress
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.run.checkpoint import (
    checkpoints,
    load_checkpoint,
    require_tensors,
    require_weights,
    save_checkpoint,
    unfit,
)
from tec_cache.run.compiling import compile_in_place, explained_compiling
from tec_cache.run.metrics import Metrics
from tec_cache.run.optimizer import (
    create_optimizer,
    create_schedule,
    gradient_norm,
    optimizer_state,
    restore_optimizer,
    scaled_lr,
)
from tec_cache.run.stopping import stop_requested
from tec_cache.student.model import Student

MUCH_WAITING = 0.05
"""Share of the time in which the training waits for its loader that is worth a word to the user."""


@dataclass
class TrainSummary:
    """What a training did."""

    run: str
    steps: int
    total_steps: int
    finished: bool
    """Whether it reached its last step (else it was interrupted and can go on)."""
    losses: dict[str, float]
    images_per_second: float
    seconds: float
    base_calls: int | None
    """How often the base ran, for --online."""
    parameters: int
    trained_parameters: int
    left_out: int
    """Views of each epoch that filled no batch; others in each epoch."""
    waited: float
    """Share of the time in which the training waited for the loader."""
    damaged: list[str]
    """Damaged blocks that this process met and other rows stood in for (--on-error skip)."""
    target_error: float | None
    """Relative mean squared error of the stored, normalized features as it was measured; None without such."""
    foreign: list[str] = field(default_factory=list)
    """What lies in the run's folder beside the run: nothing of it is ever read or removed."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


class Trainer:
    """The training loop's state: model, optimizer, schedule, loader, and how far it is."""

    def __init__(
        self,
        config: TrainConfig,
        cache: Cache,
        source: TargetSource,
        student: Student,
        compute: Compute,
        ranks: Ranks,
    ) -> None:
        self.config, self.source, self.compute, self.ranks = config, source, compute, ranks
        self.student = student.to(compute.device)
        self.size = int(student.encoder.patch_embed.img_size[0])
        self.micro_batches = count_micro_batches(config, ranks)
        sizes = {self.size} | ({source.pixel_size} if source.pixel_size else set())
        self.loader = Loader(
            cache,
            source.stored,
            batch_size=config.batch_size // config.masks_per_view,
            pixel_sizes=tuple(sorted(sizes)),
            num_views=config.views,
            masks_per_view=config.masks_per_view,
            shuffle_buffer=config.shuffle_buffer,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=config.workers or default_workers(compute.device, ranks.local_world_size),
            pin_memory=compute.device.type == "cuda",
            skip_damage=config.on_error == "skip",
        )
        self.total_steps = config.epochs * self.loader.steps_per_epoch
        self.stop_step = min(self.total_steps, config.steps or self.total_steps)
        self.optimizer = create_optimizer(
            student,
            lr=scaled_lr(config.base_lr, config.batch_size),
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
        )
        self.schedule = create_schedule(
            self.optimizer,
            total_steps=self.total_steps,
            warmup_steps=round(config.resolved_warmup * self.loader.steps_per_epoch),
            min_lr=config.min_lr,
        )
        if config.compile:
            compile_in_place(self.student, ranks)
        self.model: nn.Module = self.student
        if ranks.world_size > 1:
            ids = [compute.device] if compute.device.type == "cuda" else None
            # the gradients lie in the buckets that travel: no copy of them
            self.model = DistributedDataParallel(self.student, device_ids=ids, gradient_as_bucket_view=True)
        self.mean = torch.tensor(IMAGENET_MEAN, device=compute.device)
        self.std = torch.tensor(IMAGENET_STD, device=compute.device)
        self.step = 0
        self.checked = 0
        """The last step whose gradient was seen to be finite."""
        self.grad_norm: torch.Tensor | None = None
        """The norm of the last step's gradient, where it was measured."""
        names = ["loss", "feature"] + (["attention"] if student.targets.k is not None else [])
        self.sums = {name: torch.zeros((), device=compute.device) for name in names}
        self.summed = 0
        self.last: dict[str, float] = {}
        self.images = 0
        self.waited = 0.0

    def resume(self, path: Path | None, identity: str) -> None:
        """Take up a checkpoint of the run of that identity. Raises TecCacheError where it is not this run's."""
        if path is not None:
            self._restore(load_checkpoint(path, identity, self.compute.device), path)
        if self.ranks.world_size > 1:
            steps = torch.tensor([self.step, -self.step], device=self.compute.device)
            torch.distributed.all_reduce(steps, op=torch.distributed.ReduceOp.MAX)
            if steps[0] != -steps[1]:
                raise TecCacheError(
                    f"the ranks found different checkpoints (steps {-int(steps[1])} to {int(steps[0])})",
                    where=self.config.out,
                    todo="give an --out that all processes share",
                )

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        if state["step"] > self.total_steps:
            raise unfit(path, f"this checkpoint is of step {state['step']}, the run has {self.total_steps}")
        require_weights(state["student"], self.student, path)
        require_tensors(state["sums"], {name: (v.shape, v.dtype) for name, v in self.sums.items()}, path, "the losses")
        restore_optimizer(self.optimizer, self.student, state["optimizer"], step=state["step"], path=path)
        self.student.load_state_dict(state["student"], strict=True)
        self.step = self.checked = state["step"]
        self.summed, self.sums = state["summed"], dict(state["sums"])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside its run and step; the same for every number of ranks."""
        return {
            "student": dict(self.student.state_dict()),
            "optimizer": optimizer_state(self.optimizer, self.student),
            "sums": self.sums,
            "summed": self.summed,
        }

    def run(self, run: Path, identity: str, *, quiet: bool) -> TrainSummary:
        """Train to the last step, or until a signal asks to stop; leave a checkpoint either way."""
        begin = time.monotonic()
        save_steps = max(1, round(self.config.save_every * self.loader.steps_per_epoch))
        first, size = self.step, self.config.batch_size
        total = self.stop_step * size
        read = self.loader.batches(self.step, self.stop_step, micro_batches=self.micro_batches)
        with (
            stop_requested(self.ranks) as stop,
            Progress("train", total=total, noun="images", quiet=quiet) as progress,
            closing(on_device(read, self.compute.device)) as batches,
        ):
            metrics = Metrics(run, identity, resume_step=self.step) if self.ranks.main else None
            progress.start_at(self.step * size)
            while self.step < self.stop_step:
                at_end = self.step + 1 == self.stop_step
                saves = at_end or (self.step + 1) % save_steps == 0
                logs = at_end or (self.step + 1) % self.config.log_every == 0
                self.train_step(batches, check=logs or saves)
                if logs:
                    self.log(metrics, (self.step - first) * size, time.monotonic() - begin)
                stopping = stop.agreed()
                if saves or stopping:
                    self.save(run, identity)
                progress.advance(size, note=f"step {self.step:,} of {self.stop_step:,}{self.note(progress.seconds)}")
                if stopping:
                    break
        if metrics is not None:
            metrics.close()
        self.images = (self.step - first) * self.config.batch_size
        return self.summary(finished=self.step == self.stop_step, seconds=time.monotonic() - begin)

    def train_step(self, batches: Iterator[Batch], *, check: bool = True) -> None:
        """One optimizer step on this rank's next micro-batches.

        check: measure the gradient's norm (2 % of a step) and stop before the update where it or a loss is not finite;
        on a GPU this waits for it. It is enough to ask before something is logged or saved: losses that are not
        finite stay so in their sums, and `save` looks at all that it saves, so nothing of it is ever kept.
        """
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        with explained_compiling() if self.config.compile else nullcontext():
            for i in range(self.micro_batches):
                self.accumulate(self.next_batch(batches), last=i == self.micro_batches - 1)
        clips = self.config.clip_grad is not None
        self.grad_norm = gradient_norm(self.student, self.config.clip_grad) if check or clips else None
        # a loss alone is not the same on all ranks: one would stop and the others wait for it
        if check or (self.compute.device.type == "cpu" and (clips or self.ranks.world_size == 1)):
            self.require_finite(self.step + 1)
        self.optimizer.step()
        self.step += 1
        self.summed += 1

    def accumulate(self, batch: Batch, *, last: bool) -> None:
        """Add a micro-batch's gradients and losses to those of its step; gradients travel with the last one only."""
        travels = last or not isinstance(self.model, DistributedDataParallel)
        with nullcontext() if travels else self.model.no_sync():  # type: ignore[operator]
            losses = self.losses(batch)
            (losses["loss"] / self.micro_batches).backward()
        for name, value in losses.items():
            self.sums[name] += value.detach() / self.micro_batches

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Take the next batch, and note how long that took: the loader works ahead, so it should take nothing."""
        begin = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - begin
        return batch

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the losses of one micro-batch, their weighted sum under "loss"."""
        images = batch.images(self.size, self.mean, self.std)
        with self.compute.autocast():
            targets = self.source.targets(batch, images)
            losses = self.model(images, targets, noise=batch.noise)
        total = self.config.feature_weight * losses["feature"]
        if "attention" in losses:
            total = total + self.config.attention_weight * losses["attention"]
        return {"loss": total, **losses}

    def require_finite(self, step: int) -> None:
        """Stop before a step's update where its gradient, or a loss up to it, is not finite.

        The norm is the same on all ranks, so all of them see what is not finite on any.
        """
        seen = [self.sums["loss"]] + ([] if self.grad_norm is None else [self.grad_norm])
        if not torch.stack(seen).isfinite().all():
            raise self.not_finite("the loss or its gradient", step)
        if self.grad_norm is not None:
            self.checked = step

    def require_finite_state(self) -> None:
        """Stop before anything is saved that is not finite: what a bad gradient spoiled, which no loss need tell."""
        moments = (value for entry in self.optimizer.state.values() for value in entry.values())
        kept = (*self.student.parameters(), *moments, *self.sums.values())
        if not torch.stack([tensor.isfinite().all() for tensor in kept]).all():
            raise self.not_finite("a weight, the optimizer's state of one, or a loss", self.step)

    def not_finite(self, what: str, step: int) -> NonFiniteError:
        """Return the error for what was noticed in a step and may have begun since the last one that was checked."""
        kept = checkpoints(Path(self.config.out))
        since = f" (it may have begun after step {self.checked})" if self.checked < step - 1 else ""
        return NonFiniteError(
            f"{what} is not finite at step {step}{since}",
            where=f"last good checkpoint: {kept[-1] if kept else 'none yet'}",
            todo="lower --base-lr, give --clip-grad 1, or --precision float32, with another --out",
        )

    def save(self, run: Path, identity: str) -> None:
        """Write a checkpoint of the last step; all ranks take part."""
        self.average_sums()
        self.require_finite_state()
        if self.ranks.main:
            save_checkpoint(run, identity, self.step, self.state())

    def average_sums(self) -> None:
        """Make the sums of losses the same on all ranks, for a log or a checkpoint."""
        if self.ranks.world_size > 1:
            values = torch.stack(list(self.sums.values()))
            torch.distributed.all_reduce(values)
            self.sums = dict(zip(self.sums, (values / self.ranks.world_size).unbind(), strict=True))

    def log(self, metrics: Metrics | None, images: int, seconds: float) -> None:
        """Write the losses, averaged over ranks and the steps since the last line, and this step's gradient norm."""
        self.average_sums()
        assert self.grad_norm is not None, "a step that logs measures it"
        values = torch.stack([*(total / self.summed for total in self.sums.values()), self.grad_norm])
        self.last = dict(zip([*self.sums, "grad_norm"], values.tolist(), strict=True))
        self.sums = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        self.summed = 0
        if metrics is not None:
            lr = self.optimizer.param_groups[0]["lr"]
            epoch = (self.step - 1) // self.loader.steps_per_epoch
            speed = {"images_per_second": images / seconds, "waited": self.waited / seconds}
            metrics.log(self.step, self.last | {"lr": lr, "epoch": epoch, **speed})

    def note(self, seconds: float) -> str:
        """Write the last losses for the progress line, and the loader where it is too slow."""
        losses = "".join(f", {name} {value:.4f}" for name, value in self.last.items() if name != "grad_norm")
        if self.waited > MUCH_WAITING * seconds:
            losses += f", waits for the loader {self.waited / seconds:.0%} of the time"
        return losses + (f", {len(self.loader.damaged)} damaged blocks" if self.loader.damaged else "")

    def target_error(self) -> float | None:
        """Return by how much coding may lower the feature loss: what it left out need not be predicted.

        The squared error of what is left out, where targets have a mean square of about 1.
        """
        stored = self.source.stored
        if stored is None or self.source.spec.normalization == "none":
            return None
        return stored.codec_record.errors.get("mse")

    def summary(self, *, finished: bool, seconds: float) -> TrainSummary:
        """Describe what was done."""
        parameters = list(self.student.parameters())
        return TrainSummary(
            run=self.config.out,
            steps=self.step,
            total_steps=self.total_steps,
            finished=finished,
            losses=self.last,
            images_per_second=self.images / seconds if seconds else 0.0,
            seconds=seconds,
            base_calls=self.source.base.num_calls if isinstance(self.source, OnlineTargets) else None,
            parameters=sum(p.numel() for p in parameters),
            trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            left_out=self.loader.left_out,
            waited=self.waited / seconds if seconds else 0.0,
            damaged=sorted(self.loader.damaged),
            target_error=self.target_error(),
        )


def count_micro_batches(config: TrainConfig, ranks: Ranks) -> int:
    """Return how many forward passes a process makes for one step. ConfigError where the batch does not divide."""
    share, masks = config.batch_size // ranks.world_size, config.masks_per_view
    if config.batch_size % (ranks.world_size * masks):
        raise ConfigError(
            f"a batch of {config.batch_size} does not divide among {ranks.world_size} processes "
            f"and {masks} masks for each view",
            todo=f"use a --batch-size that {ranks.world_size * masks} divides",
        )
    count = math.ceil(share / (config.micro_batch or share))
    if share % (count * masks):
        raise ConfigError(
            f"{share // masks} views per process do not divide into micro-batches of {config.micro_batch}"
            + (f", {masks} masks for each view" if masks > 1 else ""),
            todo=f"use a --micro-batch that divides {share}" + (f" and that {masks} divides" if masks > 1 else ""),
        )
    return count
