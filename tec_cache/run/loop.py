"""The training loop: one step of any task, and when it is logged, judged, saved and stopped.

It knows no task: what trains, on what, and what its losses are, a `Task` says.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tec_cache.device import Compute
from tec_cache.distributed import Ranks, agreed
from tec_cache.errors import NonFiniteError, TecCacheError
from tec_cache.loop_settings import LoopSettings
from tec_cache.memory import explained_memory
from tec_cache.progress import Progress
from tec_cache.rng import key64
from tec_cache.run.checkpoint import load_checkpoint, require_tensors, require_weights
from tec_cache.run.checkpoint import unfit as unfit_checkpoint
from tec_cache.run.compiling import compile_in_place, explained_compiling
from tec_cache.run.extending import Extension, Lengthened, parts_of
from tec_cache.run.feed import B, on_device
from tec_cache.run.generators import generators_kept
from tec_cache.run.layout import checkpoints
from tec_cache.run.metrics import Metrics, read_metrics
from tec_cache.run.micro_batches import next_smaller
from tec_cache.run.optimizer import (
    create_schedule,
    gradient_norm,
    optimizer_state,
    restore_optimizer,
    scaled_lr,
)
from tec_cache.run.saving import Saver
from tec_cache.run.stopping import stop_requested
from tec_cache.tasks.task import Task

MUCH_WAITING = 0.05
"""Share of the time in which the training waits for its loader that is worth a word to the user."""


@dataclass
class LoopSummary:
    """What a training did."""

    run: str
    steps: int
    total_steps: int
    micro_batch: int
    """Rows of a forward pass."""
    finished: bool
    """Whether it reached its last step (else it was interrupted and can go on)."""
    losses: dict[str, float]
    """As they were last logged: means over the steps since the log line before."""
    losses_step: int
    """The step at which that was."""
    images_per_second: float
    seconds: float
    parameters: int
    trained_parameters: int
    waited: float
    """Share of the time in which the training waited for the loader."""


class Interval:
    """The time between two lines of a log: what the training did in it, without judging."""

    def __init__(self) -> None:
        self.begin(0, waited=0.0, judged=0.0)

    def begin(self, images: int, *, waited: float, judged: float) -> None:
        """Begin the next one. images, waited, judged: of this call so far."""
        self._begun, self._images, self._waited, self._judged = time.monotonic(), images, waited, judged

    def figures(self, images: int, *, waited: float, judged: float) -> dict[str, float]:
        """Return images_per_second, waited (a share) and seconds of the interval that ends now."""
        seconds = max(time.monotonic() - self._begun - (judged - self._judged), 1e-9)
        return {
            "images_per_second": (images - self._images) / seconds,
            "waited": (waited - self._waited) / seconds,
            "seconds": seconds,
        }


class Loop(Generic[B]):
    """A training's state: model, optimizer, schedule, and how far it is."""

    def __init__(self, task: Task[B], config: LoopSettings, compute: Compute, ranks: Ranks) -> None:
        self.task, self.config, self.compute, self.ranks = task, config, compute, ranks
        self.module = task.module
        self.total_steps = config.epochs * task.steps_per_epoch
        self.stop_step = min(self.total_steps, config.steps or self.total_steps)
        self.optimizer = task.optimizer(scaled_lr(config.base_lr, config.batch_size))
        self.schedule: Scheduler | Lengthened = self.schedule_of(config.epochs)
        if config.compile:
            compile_in_place(self.module, ranks)
        self.model: nn.Module = self.module
        if ranks.world_size > 1:
            ids = [compute.device] if compute.device.type == "cuda" else None
            # the gradients lie in the buckets that travel: no copy of them
            self.model = DistributedDataParallel(self.module, device_ids=ids, gradient_as_bucket_view=True)
        self.micro_batch = config.batch_size // ranks.world_size // task.micro_batches
        self.step = 0
        self.checked = 0
        """The last step whose gradient was seen to be finite."""
        self.grad_norm: torch.Tensor | None = None
        """The norm of the last step's gradient, where it was measured."""
        self.sums = {name: torch.zeros((), device=compute.device) for name in task.terms}
        self.summed = 0
        self.last: dict[str, float] = {}
        """Losses and gradient norm, as they were last read from the device."""
        self.last_step = 0
        """The step up to which they are."""
        self.images = 0
        self.waited = 0.0
        """Seconds of this call in which the training waited for its loader."""
        self.judged = 0.0
        """Seconds of evaluation, which no step is charged with."""
        self.interval = Interval()
        """Since the last line of the log."""
        self.waiting: float | None = None
        """Share of the last whole interval in which the training waited for its loader."""
        self.saver: Saver | None = None
        """Of rank 0, while it runs."""
        self.saved = 0
        """Checkpoints of this call, of all ranks together."""
        self.saved_at = time.monotonic()

    def schedule_of(self, epochs: int) -> Scheduler:
        """Return the learning rates of this run if it had so many epochs."""
        for group in self.optimizer.param_groups:  # where another schedule has set it
            group["lr"] = group.get("initial_lr", group["lr"])
        config, per_epoch = self.config, self.task.steps_per_epoch
        return create_schedule(
            self.optimizer,
            total_steps=epochs * per_epoch,
            warmup_steps=round(replace(config, epochs=epochs).resolved_warmup * per_epoch),
            min_lr=config.min_lr,
            kind=config.schedule,
        )

    def resume(self, path: Path | None, identity: str, extensions: Sequence[Extension] = ()) -> None:
        """Take up a checkpoint of the run of that identity. Raises TecCacheError where it is not this run's.

        extensions: how the run was lengthened.
        """
        if extensions:
            self.schedule = Lengthened([(first, self.schedule_of(epochs)) for first, epochs in parts_of(extensions)])
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
            raise unfit_checkpoint(path, f"this checkpoint is of step {state['step']}, the run has {self.total_steps}")
        require_weights(state["model"], self.module, path)
        require_tensors(state["sums"], {name: (v.shape, v.dtype) for name, v in self.sums.items()}, path, "the losses")
        restore_optimizer(self.optimizer, self.module, state["optimizer"], step=state["step"], path=path)
        self.module.load_state_dict(state["model"], strict=True)
        self.step = self.checked = state["step"]
        self.summed, self.sums = state["summed"], dict(state["sums"])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside its run and step; the same for every number of ranks."""
        return {
            "model": dict(self.module.state_dict()),
            "optimizer": optimizer_state(self.optimizer, self.module),
            "sums": self.sums,
            "summed": self.summed,
        }

    def run(self, run: Path, identity: str, *, quiet: bool) -> LoopSummary:
        """Train to the last step, or until a signal asks to stop; leave a checkpoint either way."""
        begin, epoch = time.monotonic(), self.task.steps_per_epoch
        save_steps = max(1, round(self.config.save_every * epoch))
        judge_steps = self.task.judged_every * epoch
        first, size = self.step, self.config.batch_size
        read = self.task.batches(self.step, self.stop_step)
        late, self.saved_at = False, begin
        with (
            stop_requested(self.ranks) as stop,
            Progress("train", total=self.stop_step * size, noun="image", quiet=quiet) as progress,
            closing(on_device(read, self.compute.device)) as batches,
            ExitStack() as files,
        ):
            metrics = None
            if self.ranks.main:
                metrics = files.enter_context(closing(Metrics(run, identity, resume_step=self.step)))
                self.saver = files.enter_context(Saver(run, identity))
            progress.start_at(self.step * size)
            self.interval.begin(0, waited=self.waited, judged=self.judged)
            if judge_steps > 0 and self.step and (self.step % judge_steps == 0 or self.step >= self.stop_step):
                self.judge_again(metrics, run)
            while self.step < self.stop_step:
                at_end = self.step + 1 == self.stop_step
                judges = judge_steps > 0 and (at_end or (self.step + 1) % judge_steps == 0)
                due = at_end or (self.step + 1) % save_steps == 0
                saves = at_end or (due and (late or not self.config.save_minutes))
                logs = at_end or (self.step + 1) % self.config.log_every == 0
                self.train_step(batches, check=logs or judges or saves)
                if logs or judges:
                    scores = self.judge() if judges else {}
                    self.log(metrics, (self.step - first) * size, scores, due=logs)
                elif self.step == first + 1:
                    # so that the first line has losses; no number of the run sees it
                    self.last, self.last_step = self.means(), self.step
                if self.step == first + 1:
                    progress.say(f"step {self.step:,} of {self.stop_step:,}{self.losses_text()}")
                if due:  # also where the minutes have not passed: whether they have must not show in any number
                    self.sums = self.averaged_sums()
                stopping, late = stop.agreed(self.late(), self.saved)
                if saves or stopping:
                    self.save()
                    late = False
                if self.saver is not None:
                    self.saver.check()
                progress.advance(size, note=f"step {self.step:,} of {self.stop_step:,}{self.note(progress.seconds)}")
                if stopping:
                    break
        self.images = (self.step - first) * size
        return self.summary(finished=self.step >= self.stop_step, seconds=time.monotonic() - begin)

    def late(self) -> bool:
        """Say whether the minutes between two checkpoints have passed, by this rank's clock."""
        return time.monotonic() - self.saved_at >= 60 * self.config.save_minutes

    def train_step(self, batches: Generator[B, None, None], *, check: bool = True) -> None:
        """One optimizer step on this rank's next micro-batches.

        check: measure the gradient's norm (2 % of a step) and stop before the update where it or a loss is not finite;
        on a GPU this waits for it. It is enough to ask before something is logged or saved: losses that are not
        finite stay so in their sums, and `save` looks at all that it saves, so nothing of it is ever kept.
        """
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        if self.task.draws:
            torch.manual_seed(key64("step", self.config.seed, self.step, self.ranks.rank) >> 1)
        with self.explained_memory(f"a micro-batch of {self.micro_batch}"), self.explained_compiling():
            for i in range(self.task.micro_batches):
                self.accumulate(self.next_batch(batches), last=i == self.task.micro_batches - 1)
        clips = self.config.clip_grad is not None
        self.grad_norm = gradient_norm(self.module, self.config.clip_grad) if check or clips else None
        # a loss alone is not the same on all ranks: one would stop and the others wait for it
        if check or (self.compute.device.type == "cpu" and (clips or self.ranks.world_size == 1)):
            self.require_finite(self.step + 1)
        with self.explained_memory("the optimizer's state"):
            self.optimizer.step()
        self.step += 1
        self.summed += 1

    def accumulate(self, batch: B, *, last: bool) -> None:
        """Add a micro-batch's gradients and losses to those of its step; gradients travel with the last one only."""
        travels = last or not isinstance(self.model, DistributedDataParallel)
        with nullcontext() if travels else self.model.no_sync():  # type: ignore[operator]
            losses = self.losses(batch)
            (losses["loss"] / self.task.micro_batches).backward()
        for name, value in losses.items():
            self.sums[name] += value.detach() / self.task.micro_batches

    def explained_memory(self, what: str) -> AbstractContextManager[None]:
        """Say which --micro-batch to give where memory does not suffice for something."""

        def todo() -> str:
            saves = "" if self.config.checkpointing else ", or keep less of each block with --checkpointing"
            smaller = next_smaller(self.config, self.ranks, self.micro_batch)
            if smaller is None:
                return "use more processes, or a GPU with more memory" + saves
            return f"give --micro-batch {smaller}" + saves

        return explained_memory(lambda: f"{what} at step {self.step + 1}", str(self.compute.device), todo)

    def explained_compiling(self) -> AbstractContextManager[None]:
        """Say what to do where torch.compile fails."""
        return explained_compiling() if self.config.compile else nullcontext()

    def losses(self, batch: B) -> dict[str, torch.Tensor]:
        """Return the losses of one micro-batch."""
        with self.compute.autocast():
            return self.task.losses(self.model, batch)

    def next_batch(self, batches: Generator[B, None, None]) -> B:
        """Take the next batch, and note how long that took: the loader works ahead, so it should take nothing."""
        begin = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - begin
        return batch

    def evaluate(self) -> dict[str, float]:
        """Judge the module as it is after this step, without a trace on what follows."""
        begin = time.monotonic()
        self.module.eval()
        if self.ranks.world_size > 1:  # statistics of BatchNorm are each rank's own, and rank 0's are what is saved
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, src=0)
        judging = self.explained_memory("judging")
        with judging, generators_kept(self.compute.device), torch.no_grad(), self.compute.autocast():
            scores = self.task.evaluate(self.module)
        self.module.train()
        self.judged += time.monotonic() - begin
        return scores

    def judge_again(self, metrics: Metrics | None, run: Path) -> None:
        """Judge the step at which a run goes on, where that is due and failed before: then it has no line."""
        has_line = metrics is not None and any(line["step"] == self.step for line in read_metrics(run))
        if not agreed(has_line, self.ranks):
            self.log(metrics, None, self.evaluate(), due=False)

    def judge(self) -> dict[str, float]:
        """Judge after this step; where that fails, for a broken photo, keep the step: it took an epoch to come here."""
        try:
            return self.evaluate()
        except TecCacheError:
            if self.ranks.world_size == 1:  # of several ranks, this one alone may have met it
                self.save()
                self.wait_for_checkpoint()
            raise

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
        kept = (*self.module.parameters(), *moments, *self.sums.values())
        if not torch.stack([tensor.isfinite().all() for tensor in kept]).all():
            raise self.not_finite("a weight, the optimizer's state of one, or a loss", self.step)

    def not_finite(self, what: str, step: int) -> NonFiniteError:
        """Return the error for what was noticed in a step and may have begun since the last one that was checked."""
        self.wait_for_checkpoint()  # it is a good one
        kept = checkpoints(Path(self.config.out))
        since = f" (it may have begun after step {self.checked})" if self.checked < step - 1 else ""
        return NonFiniteError(
            f"{what} is not finite at step {step}{since}",
            where=f"last good checkpoint: {kept[-1] if kept else 'none yet'}",
            todo="lower --base-lr, give --clip-grad 1, or --precision float32, with another --out",
        )

    def save(self) -> None:
        """Begin to write a checkpoint of the last step; all ranks take part, rank 0 writes."""
        self.sums = self.averaged_sums()
        self.require_finite_state()
        if self.saver is not None:
            self.saver.save(self.step, self.state())
        self.saved += 1
        self.saved_at = time.monotonic()

    def wait_for_checkpoint(self) -> None:
        """Wait until the last one is written. Raises TecCacheError where it cannot be."""
        if self.saver is not None:
            self.saver.wait()

    def averaged_sums(self) -> dict[str, torch.Tensor]:
        """Return the sums of losses, the same on all ranks, for a log or a checkpoint."""
        if self.ranks.world_size == 1:
            return self.sums
        values = torch.stack(list(self.sums.values()))
        torch.distributed.all_reduce(values)
        return dict(zip(self.sums, (values / self.ranks.world_size).unbind(), strict=True))

    def means(self) -> dict[str, float]:
        """Return the losses, averaged over ranks and the steps since the last line, and the last step's norm."""
        sums = self.averaged_sums()
        values = {name: total / self.summed for name, total in sums.items() if self.summed}
        if self.grad_norm is not None:  # none where a run goes on with a judgement
            values["grad_norm"] = self.grad_norm
        read = torch.stack(list(values.values())).tolist() if values else []  # one wait for the device
        return dict(zip(values, read, strict=True))

    def log(self, metrics: Metrics | None, images: int | None, scores: dict[str, float], *, due: bool = True) -> None:
        """Write the losses, averaged over ranks and the steps since the last line, this step's norm, and scores.

        images: of this call; None before its first step, which has no speed. due: whether this is a line of
        --log-every. One that comes between, for its scores, leaves the sums as they are: that a training is judged
        changes no other number of it.
        """
        self.last, self.last_step = self.means(), self.step
        if due:
            self.sums = {name: torch.zeros_like(total) for name, total in self.sums.items()}
            self.summed = 0
        speed: dict[str, float] = {}
        if images is not None:
            speed = self.interval.figures(images, waited=self.waited, judged=self.judged)
            self.waiting = speed["waited"]
        self.interval.begin(images or 0, waited=self.waited, judged=self.judged)
        if metrics is not None:
            lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in self.optimizer.param_groups)
            epoch = (self.step - 1) // self.task.steps_per_epoch
            figures = self.task.figures()
            metrics.log(self.step, self.last | {"lr": lr, "epoch": epoch, **speed, **figures, **scores})

    def losses_text(self) -> str:
        """Write the last losses for a line of progress."""
        text = "".join(f", {name} {value:.4f}" for name, value in self.last.items() if name != "grad_norm")
        return text if not text or self.last_step == self.step else f"{text} (step {self.last_step:,})"

    def note(self, seconds: float) -> str:
        """Write the last losses for the progress line, and the loader where it is too slow."""
        said = self.losses_text()
        waiting = self.waited / max(seconds, 1e-9) if self.waiting is None else self.waiting
        if waiting > MUCH_WAITING:
            said += f", waits for the loader {waiting:.0%} of the time"
        note = self.task.note()
        return said + (f", {note}" if note else "")

    def summary(self, *, finished: bool, seconds: float) -> LoopSummary:
        """Describe what was done."""
        parameters = list(self.module.parameters())
        return LoopSummary(
            run=self.config.out,
            steps=self.step,
            total_steps=self.total_steps,
            micro_batch=self.micro_batch,
            finished=finished,
            losses=self.last,
            losses_step=self.last_step,
            images_per_second=self.images / (seconds - self.judged) if seconds else 0.0,
            seconds=seconds,
            parameters=sum(p.numel() for p in parameters),
            trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            waited=self.waited / seconds if seconds else 0.0,
        )
