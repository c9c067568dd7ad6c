"""The training loop: what one run holds in memory, one step of it, and when it logs, saves and stops."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
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
from tec_cache.run.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from tec_cache.run.compiling import compile_in_place, explained_compiling
from tec_cache.run.metrics import Metrics
from tec_cache.run.optimizer import create_optimizer, create_schedule, gradient_norm, scaled_lr
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
        names = ["loss", "feature"] + (["attention"] if student.targets.k is not None else []) + ["grad_norm"]
        self.sums = {name: torch.zeros((), device=compute.device) for name in names}
        self.summed = 0
        self.last: dict[str, float] = {}
        self.images = 0
        self.waited = 0.0

    def resume(self, path: Path | None) -> None:
        """Take up a checkpoint."""
        if path is not None:
            self._restore(load_checkpoint(path, self.compute.device))
        if self.ranks.world_size > 1:
            steps = torch.tensor([self.step, -self.step], device=self.compute.device)
            torch.distributed.all_reduce(steps, op=torch.distributed.ReduceOp.MAX)
            if steps[0] != -steps[1]:
                raise TecCacheError(
                    f"the ranks found different checkpoints (steps {-int(steps[1])} to {int(steps[0])})",
                    where=self.config.out,
                    todo="give an --out that all processes share",
                )

    def _restore(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.summed = int(state["step"]), int(state["summed"])
        self.sums = {name: value.to(self.compute.device) for name, value in state["sums"].items()}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside its step; the same for every number of ranks."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums,
            "summed": self.summed,
        }

    def run(self, run: Path, *, quiet: bool) -> TrainSummary:
        """Train to the last step, or until a signal asks to stop; leave a checkpoint either way."""
        begin = time.monotonic()
        metrics = Metrics(run, resume_step=self.step) if self.ranks.main else None
        save_steps = max(1, round(self.config.save_every * self.loader.steps_per_epoch))
        first, size = self.step, self.config.batch_size
        total = self.stop_step * size
        read = self.loader.batches(self.step, self.stop_step, micro_batches=self.micro_batches)
        with (
            stop_requested(self.ranks) as stop,
            Progress("train", total=total, noun="images", quiet=quiet) as progress,
            closing(on_device(read, self.compute.device)) as batches,
        ):
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
                    self.save(run)
                progress.advance(size, note=f"step {self.step:,} of {self.stop_step:,}{self.note(progress.seconds)}")
                if stopping:
                    break
        if metrics is not None:
            metrics.close()
        self.images = (self.step - first) * self.config.batch_size
        return self.summary(finished=self.step == self.stop_step, seconds=time.monotonic() - begin)

    def train_step(self, batches: Iterator[Batch], *, check: bool = True) -> None:
        """One optimizer step on this rank's next micro-batches.

        check: stop before the update where a loss or the gradient is not finite. On a GPU this waits for it; what
        is not finite stays so in the sums, so it is enough to ask before something is written.
        """
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        with explained_compiling() if self.config.compile else nullcontext():
            for i in range(self.micro_batches):
                self.accumulate(self.next_batch(batches), last=i == self.micro_batches - 1)
        # the norm is the same on all ranks, so all of them see what is not finite on any
        self.sums["grad_norm"] += gradient_norm(self.student, self.config.clip_grad)
        if check or self.compute.device.type == "cpu":
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
        """Stop before weights that a bad loss or gradient has spoiled, or would spoil, are saved."""
        if torch.stack([self.sums["loss"], self.sums["grad_norm"]]).isfinite().all():
            return
        kept = checkpoints(Path(self.config.out))
        raise NonFiniteError(
            f"the loss or its gradient is not finite at step {step}",
            where=f"last good checkpoint: {kept[-1] if kept else 'none yet'}",
            todo="lower --base-lr, give --clip-grad 1, or --precision float32, with another --out",
        )

    def save(self, run: Path) -> None:
        """Write a checkpoint of the last step; all ranks take part."""
        self.require_finite(self.step)
        self.average_sums()
        if self.ranks.main:
            save_checkpoint(run, self.step, self.state())

    def average_sums(self) -> None:
        """Make the sums of losses the same on all ranks, for a log or a checkpoint."""
        if self.ranks.world_size > 1:
            values = torch.stack(list(self.sums.values()))
            torch.distributed.all_reduce(values)
            self.sums = dict(zip(self.sums, (values / self.ranks.world_size).unbind(), strict=True))

    def log(self, metrics: Metrics | None, images: int, seconds: float) -> None:
        """Average the losses since the last line over steps and ranks, and write them."""
        self.average_sums()
        values = torch.stack(list(self.sums.values())) / self.summed
        self.last = dict(zip(self.sums, values.tolist(), strict=True))
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
