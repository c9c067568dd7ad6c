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
from tec_cache.errors import ConfigError, NonFiniteError, TecCacheError
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
            skip_damage=config.on_error == "skip",
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
        names = ["loss", "feature"] + (["attention"] if student.targets.k is not None else []) + ["grad_norm"]
        self.sums = {name: torch.zeros((), device=compute.device) for name in names}
        self.summed = 0
        self.last: dict[str, float] = {}
        self.images = 0

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
        with stop_requested(self.ranks) as stop, Progress("train", total=total, noun="images", quiet=quiet) as progress:
            progress.start_at(self.step * size)
            batches = self.loader.batches(self.step, self.stop_step, micro_batches=self.micro_batches)
            for epoch, parts in batches:
                at_end = self.step + 1 == self.stop_step
                saves = at_end or (self.step + 1) % save_steps == 0
                logs = at_end or (self.step + 1) % self.config.log_every == 0
                self.train_step(epoch, parts, check=logs or saves)
                if logs:
                    rate = (self.step - first) * size / (time.monotonic() - begin)
                    self.log(metrics, epoch, rate)
                stopping = stop.agreed()
                if saves or stopping:
                    self.save(run)
                progress.advance(size, note=f"step {self.step:,} of {self.stop_step:,}{self.note()}")
                if stopping:
                    break
            batches.close()
        if metrics is not None:
            metrics.close()
        self.images = (self.step - first) * self.config.batch_size
        return self.summary(finished=self.step == self.stop_step, seconds=time.monotonic() - begin)

    def train_step(self, epoch: int, parts: list[Batch], *, check: bool = True) -> None:
        """One optimizer step on this rank's micro-batches.

        check: stop before the update where a loss or the gradient is not finite. On a GPU this waits for it; what
        is not finite stays so in the sums, so it is enough to ask before something is written.
        """
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
        # the norm is the same on all ranks, so all of them see what is not finite on any
        self.sums["grad_norm"] += nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_grad or math.inf)
        if check or self.compute.device.type == "cpu":
            self.require_finite(self.step + 1)
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

    def log(self, metrics: Metrics | None, epoch: int, rate: float) -> None:
        """Average the losses since the last line over steps and ranks, and write them."""
        self.average_sums()
        values = torch.stack(list(self.sums.values())) / self.summed
        self.last = dict(zip(self.sums, values.tolist(), strict=True))
        self.sums = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        self.summed = 0
        if metrics is not None:
            lr = self.optimizer.param_groups[0]["lr"]
            metrics.log(self.step, self.last | {"lr": lr, "epoch": epoch, "images_per_second": rate})

    def note(self) -> str:
        """Write the last losses for the progress line."""
        losses = "".join(f", {name} {value:.4f}" for name, value in self.last.items() if name != "grad_norm")
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
            damaged=sorted(self.loader.damaged),
        )
