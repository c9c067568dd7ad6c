"""What every task's training is told: components that are declared once, and composed into each task's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tec_cache.errors import ConfigError
from tec_cache.fields import DEVICES, Names, check_choices, check_positive, check_range, expand_paths, setting
from tec_cache.printable import plural
from tec_cache.store import is_url


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lies, and when it is logged and saved."""

    TITLE: ClassVar[str] = "Run"

    # not --run: torchrun would take it for its own --run-path
    out: str = setting("", "Folder of the run: its settings, checkpoints and metrics.", names=Names.RUN, required=True)
    steps: int | None = setting(None, "Stop after this many steps of the schedule.  [default: at its end]")
    seed: int = setting(0, "Seed of the initial weights, the order of samples, masks and augmentations.")
    log_every: int = setting(20, "Steps between two lines of metrics.jsonl, the log.")
    save_every: float = setting(1.0, "Epochs between two checkpoints; may be a fraction.")
    save_minutes: float = setting(
        10.0, "Least minutes between two checkpoints, so that short epochs do not write one each."
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the weights change."""

    TITLE: ClassVar[str] = "Optimizer and schedule"

    epochs: int = setting(300, "Epochs of the schedule; in each, every photo is seen once.")
    warmup_epochs: float | None = setting(
        None, "Epochs in which the learning rate rises linearly.  [default: 40; a tenth of fewer than 100 epochs]"
    )
    batch_size: int = setting(4096, "Views or photos per step, all processes together.")
    micro_batch: int | None = setting(
        None, "Views or photos per forward pass of a process.  [default: what fits the GPU; on a CPU the whole batch]"
    )
    base_lr: float = setting(1.5e-4, "Peak learning rate for a batch of 256; it is scaled by batch size / 256.")
    min_lr: float = setting(0.0, "Learning rate at the end of the schedule.")
    schedule: str = setting(
        "cosine",
        "How the learning rate falls from its peak to --min-lr: as half a cosine or a line.",
        choices=("cosine", "linear"),
    )
    weight_decay: float = setting(0.05, "Weight decay; biases and norms have none.")
    beta1: float = setting(0.9, "First beta of AdamW: decay of the mean of gradients.")
    beta2: float = setting(0.95, "Second beta of AdamW: decay of the mean of their squares.")
    clip_grad: float | None = setting(
        None, "Largest norm of the gradient; a larger one is scaled down.  [default: no limit]"
    )


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """On what it is computed."""

    TITLE: ClassVar[str] = "Device"

    device: str = setting("auto", "Where the model runs: auto, cpu, cuda or cuda:N.", words=DEVICES)
    precision: str = setting(
        "auto", "Number format of the model; auto is bfloat16 on a GPU.", choices=("auto", "float32", "bfloat16")
    )
    threads: int | None = setting(None, "CPU threads of the model.  [default: all cores]")
    workers: int | None = setting(
        None, "How many readers load and decode the data.  [default: all cores beside a GPU, else 1]"
    )
    compile: bool = setting(False, "Use torch.compile: it takes minutes once, and makes steps faster.")
    checkpointing: bool = setting(False, "Recompute blocks in the backward pass: less memory, slower steps.")


@dataclass(frozen=True, kw_only=True)
class LoopSettings(RunSettings, OptimizerSettings, ComputeSettings):
    """What the one training loop is told, whatever its task."""

    TITLE: ClassVar[str] = "Loop"

    def __post_init__(self) -> None:
        expand_paths(self)
        check_choices(self)
        check_positive(self, "epochs", "batch_size", "micro_batch", "threads", "workers", "log_every", "steps")
        check_range(self, 0, "base_lr", "min_lr", "weight_decay", "save_minutes")
        check_range(self, 0, "clip_grad", "save_every", open_end=True)
        check_range(self, 0, "beta1", "beta2", below=1)
        if not self.out:
            raise ConfigError("no out was named", todo="give --out DIR")
        if is_url(self.out):
            raise ConfigError("--out is no local folder", where=self.out, todo="give --out a folder of a disk")
        warmup, epochs = self.warmup_epochs, self.epochs
        if warmup is not None and (warmup < 0 or (epochs is not None and warmup >= epochs)):
            raise ConfigError(
                f"a warm-up of {warmup:g} {plural(warmup, 'epoch')} in {self.epochs}",
                todo="give less --warmup-epochs",
            )

    @property
    def resolved_warmup(self) -> float:
        """Epochs of warm-up: 40 as in the pretraining recipe from 100 epochs on, a tenth below."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return 40.0 if self.epochs >= 100 else self.epochs / 10

    @property
    def rows_together(self) -> int:
        """Rows of a batch that belong to one view, and so to one forward pass."""
        return 1
