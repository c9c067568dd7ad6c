"""Stage two: crops and targets from the cache -> a new ViT. As often as wanted."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.target_sources import OnlineTargets, TargetSource, base_weights_for, choose_targets
from tec_cache.cache.identity import require_same
from tec_cache.cache.reader import Cache, open_cache
from tec_cache.config import TrainConfig
from tec_cache.device import Compute, available_cores, resolve_compute
from tec_cache.distributed import Ranks, process_group
from tec_cache.errors import ConfigError, NonFiniteError, TecCacheError
from tec_cache.loader import Batch, Loader
from tec_cache.progress import Progress
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.run.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_settings,
    run_file,
    save_checkpoint,
    save_settings,
)
from tec_cache.run.metrics import Metrics
from tec_cache.run.optimizer import create_optimizer, create_schedule, scaled_lr
from tec_cache.student.masking import mask_noise
from tec_cache.student.model import Student, create_encoder
from tec_cache.weights.load import load_strict

# What may differ between a run and its resumption: it changes how fast the numbers come, not which.
_FREE = frozenset(
    {"cache", "out", "base_weights", "device", "precision", "threads", "workers", "micro_batch", "log_every",
     "save_every", "steps"}
)  # fmt: skip


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


def train(
    config: TrainConfig,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
    ranks: Ranks | None = None,
) -> TrainSummary:
    """Train a student on the targets of a cache, of a base online, or on pixels.

    Goes on from the last checkpoint of `config.out` where there is one. Raises ConfigError, IdentityError,
    CacheError, WeightsError or NonFiniteError.
    """
    ranks = ranks or Ranks.from_environment()
    compute = resolve_compute(config.device, config.precision, ranks.local_rank)
    if compute.device.type == "cpu":
        torch.set_num_threads(config.threads or max(1, available_cores() // ranks.world_size))
    cache = open_cache(config.cache)
    source, student = prepare_student(config, cache, compute)
    settings = resolved_settings(config, cache, source, student)
    run = Path(config.out)
    resume = prepare_run(run, settings, overwrite=overwrite, dry_run=dry_run, ranks=ranks)
    with process_group(ranks, compute.device.type):
        trainer = Trainer(config, cache, source, student, compute, ranks)
        trainer.resume(resume)
        if dry_run:
            return trainer.summary(finished=False, seconds=0.0)
        return trainer.run(run, quiet=quiet or not ranks.main)


def prepare_student(config: TrainConfig, cache: Cache, compute: Compute) -> tuple[TargetSource, Student]:
    """Resolve the targets, then build the student with heads that fit them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = create_encoder(config.student, cache.grid, config.student_args)
        source = choose_targets(config, cache, compute, int(encoder.patch_embed.img_size[0]))
        torch.manual_seed(config.seed)  # again: loading a base draws from the generator too
        student = Student(
            encoder,
            source.spec,
            adapters=config.adapters,  # type: ignore[arg-type]
            mask_ratio=config.mask_ratio,
            tau=source.tau,
            decoder_depth=config.decoder_depth,
            decoder_width=config.decoder_width,
            decoder_heads=config.decoder_heads,
        )
    if config.init == "base":
        load_strict(student.encoder, base_weights_for(config, source), what="the student, from the base's weights")
    return source, student


def resolved_settings(config: TrainConfig, cache: Cache, source: TargetSource, student: Student) -> dict[str, Any]:
    """Return everything that made a run, as it is kept in run.json."""
    return {
        "config": asdict(config),
        "targets": source.identity() | {"spec": student.targets.to_json(), "tau": student.tau},
        "cache": cache.fingerprint,
        "num_views": config.views or cache.num_views,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }


def prepare_run(run: Path, settings: dict[str, Any], *, overwrite: bool, dry_run: bool, ranks: Ranks) -> Path | None:
    """Make the run's folder or check that it is the same run; return the checkpoint to go on from."""
    if overwrite and ranks.world_size > 1:
        raise ConfigError("--overwrite in several processes at once", todo="remove the run's folder yourself")
    if overwrite and not dry_run and run_file(run).exists():
        shutil.rmtree(run)
    if run_file(run).exists() and not overwrite:
        stored = load_settings(run)
        require_same(
            comparable(stored),
            comparable(settings),
            what="the run",
            where=str(run),
            todo="give the settings as they were, name another --out, or replace it with --overwrite",
        )
        found = checkpoints(run)
        return found[-1] if found else None
    if not dry_run and ranks.main:
        try:
            save_settings(run, settings)
        except OSError as error:
            raise TecCacheError(
                f"the run cannot be written: {error.strerror}", where=str(run), todo="choose another --out"
            ) from error
    return None


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a run's settings that a resumption must share."""
    config = {name: value for name, value in settings["config"].items() if name not in _FREE}
    return settings | {"config": config}


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


class StopRequest:
    """Set by SIGINT or SIGTERM; the loop ends after the step it is in."""

    def __init__(self) -> None:
        self.asked = False

    def agreed(self, ranks: Ranks, device: torch.device, *, ask: bool) -> bool:
        """Say whether to stop now. Several ranks agree at the steps that are logged, so none waits for another."""
        if ranks.world_size == 1:
            return self.asked
        if not ask:
            return False
        flag = torch.tensor(float(self.asked), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


@contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request, and a second one into an exception as usual."""
    request = StopRequest()

    def ask(number: int, frame: Any) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs it keeps its own handlers
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
