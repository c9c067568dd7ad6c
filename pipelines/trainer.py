"""The training loop: what one run holds in memory, one step of it, and when it logs, saves and stops."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.target_sources import OnlineTargets, TargetSource
from tec_cache.cache.reader import Cache
from tec_cache.config import TrainConfig
from tec_cache.device import Compute
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, NonFiniteError
from tec_cache.loader import Batch, Loader
from tec_cache.progress import Progress
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.run.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from tec_cache.run.metrics import Metrics
from tec_cache.run.optimizer import create_optimizer, create_schedule, scaled_lr
from tec_cache.run.stopping import stop_requested
from tec_cache.student.masking import mask_noise
from tec_cache.student.model import Student


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
        sizes = {self.size} | ({source.pixel_size} if source.pixel_size else set())
        self.loader = Loader(
            cache,
            source.stored,
            batch_size=config.batch_size,
            pixel_sizes=tuple(sorted(sizes)),
            num_views=config.views,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=config.workers,
            pin_memory=compute.device.type == "cuda",
        )
        share = config.batch_size // ranks.world_size
        self.micro_batches = math.ceil(share / (config.micro_batch or share))
        if share % self.micro_batches:
            raise ConfigError(
                f"{share} views per process do not divide into micro-batches of {config.micro_batch}",
                todo=f"use a --micro-batch that divides {share}",
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
        self.model: nn.Module = self.student
        if ranks.world_size > 1:
            ids = [compute.device] if compute.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.student, device_ids=ids)
        self.mean = torch.tensor(IMAGENET_MEAN, device=compute.device)
        self.std = torch.tensor(IMAGENET_STD, device=compute.device)
        self.step = 0
        names = ["loss", "feature"] + (["attention"] if student.targets.k is not None else [])
        self.sums = {name: torch.zeros((), device=compute.device) for name in names}
        self.summed = 0
        self.last: dict[str, float] = {}
        self.images = 0

    def resume(self, path: Path | None) -> None:
        """Take up a checkpoint."""
        if path is None:
            return
        state = load_checkpoint(path, self.compute.device)
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
        first = self.step
        with (
            stop_requested() as stop,
            Progress("train", total=self.stop_step, noun="steps", quiet=quiet) as progress,
        ):
            progress.start_at(self.step)
            batches = self.loader.batches(self.step, self.stop_step, micro_batches=self.micro_batches)
            for epoch, parts in batches:
                self.train_step(epoch, parts)
                at_end = self.step == self.stop_step
                logs = at_end or self.step % self.config.log_every == 0
                # a GPU is not waited for until something is written; a CPU costs nothing to ask
                if logs or self.step % save_steps == 0 or self.compute.device.type == "cpu":
                    self.require_finite(run)
                if logs:
                    rate = (self.step - first) * self.config.batch_size / (time.monotonic() - begin)
                    self.log(metrics, epoch, rate)
                stopping = stop.agreed(self.ranks, self.compute.device, ask=logs)
                if (at_end or stopping or self.step % save_steps == 0) and self.ranks.main:
                    save_checkpoint(run, self.step, self.state())
                progress.advance(1, note=self.note())
                if stopping:
                    break
            batches.close()
        if metrics is not None:
            metrics.close()
        self.images = (self.step - first) * self.config.batch_size
        return self.summary(finished=self.step == self.stop_step, seconds=time.monotonic() - begin)

    def train_step(self, epoch: int, parts: list[Batch]) -> None:
        """One optimizer step on this rank's micro-batches."""
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        for i, batch in enumerate(parts):
            last = i == len(parts) - 1
            # gradients travel between processes once a step, with the last micro-batch
            quiet_sync = isinstance(self.model, DistributedDataParallel) and not last
            with self.model.no_sync() if quiet_sync else nullcontext():  # type: ignore[union-attr, operator]
                losses = self.losses(epoch, batch)
                (losses["loss"] / len(parts)).backward()
            for name, value in losses.items():
                self.sums[name] += value.detach() / len(parts)
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.step += 1
        self.summed += 1

    def losses(self, epoch: int, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the losses of one micro-batch, their weighted sum under "loss"."""
        images = batch.images(self.size, self.compute.device, self.mean, self.std)
        num_tokens = self.student.targets.num_tokens
        noise = mask_noise(batch.sample_keys, seed=self.config.seed, epoch=epoch, num_tokens=num_tokens)
        with self.compute.autocast():
            targets = self.source.targets(batch, images)
            losses = self.model(images, targets, noise=noise.to(self.compute.device))
        total = self.config.feature_weight * losses["feature"]
        if "attention" in losses:
            total = total + self.config.attention_weight * losses["attention"]
        return {"loss": total, **losses}

    def require_finite(self, run: Path) -> None:
        """Stop before a checkpoint is overwritten with weights that a bad loss has spoiled."""
        if math.isfinite(self.sums["loss"].item()):
            return
        kept = checkpoints(run)
        raise NonFiniteError(
            f"the loss is not finite at step {self.step}",
            where=f"last good checkpoint: {kept[-1] if kept else 'none yet'}",
            todo="lower --base-lr, give --clip-grad 1, or --precision float32; the same command goes on from there",
        )

    def log(self, metrics: Metrics | None, epoch: int, rate: float) -> None:
        """Average the losses since the last line over steps and ranks, and write them."""
        values = torch.stack(list(self.sums.values())) / self.summed
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(values)
            values /= self.ranks.world_size
        self.last = dict(zip(self.sums, values.tolist(), strict=True))
        for total in self.sums.values():
            total.zero_()
        self.summed = 0
        if metrics is not None:
            lr = self.optimizer.param_groups[0]["lr"]
            metrics.log(self.step, self.last | {"lr": lr, "epoch": epoch, "images_per_second": rate})

    def note(self) -> str:
        """Write the last losses for the progress line."""
        return ", ".join(f"{name} {value:.4f}" for name, value in self.last.items())

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
        )
