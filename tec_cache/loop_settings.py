"""What every task's training is told: components that are declared once, and composed into each task's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tec_cache.errors import ConfigError
from tec_cache.fields import check_choices, check_positive, check_range, expand_paths, setting
from tec_cache.store import is_url


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lies, and when it is logged and saved."""

    TITLE: ClassVar[str] = "Run"

    # not --run: torchrun would take it for its own --run-path
    out: str = setting("", "Folder of the run: settings, checkpoints, metrics.", required=True)
    steps: int | None = setting(None, "Stop after N steps of the schedule.")
    seed: int = setting(0, "Seed of weights, order and whatever else is drawn.")
    log_every: int = setting(20, "Steps between two lines of metrics.jsonl.")
    save_every: float = setting(1.0, "Epochs after which a checkpoint is due.")
    save_minutes: float = setting(10.0, "Minutes since the last one before one that is due is written.")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the weights change."""

    TITLE: ClassVar[str] = "Optimizer and schedule"

    epochs: int = setting(300, "Epochs; one epoch shows each photo once.")
    warmup_epochs: float | None = setting(None, "Linear warm-up.  [default: 40, a tenth of short runs]")
    batch_size: int = setting(4096, "Views or photos per step, over all processes.")
    micro_batch: int | None = setting(
        None, "How many of them in a forward pass.  [default: what fits a GPU; on a CPU all]"
    )
    base_lr: float = setting(1.5e-4, "Learning rate per 256 views of the batch.")
    min_lr: float = setting(0.0, "Learning rate at the end.")
    schedule: str = setting("cosine", "From the peak down to --min-lr, step by step.", choices=("cosine", "linear"))
    weight_decay: float = setting(0.05, "AdamW's, none on biases and norms.")
    beta1: float = setting(0.9, "AdamW's first beta.")
    beta2: float = setting(0.95, "AdamW's second beta.")
    clip_grad: float | None = setting(None, "Clip the gradient's norm.")


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """On what it is computed."""

    TITLE: ClassVar[str] = "Device"

    device: str = setting("auto", "auto, cpu, cuda or cuda:N.")
    precision: str = setting("auto", "Of the model; auto: bfloat16 on a GPU.", choices=("auto", "float32", "bfloat16"))
    threads: int | None = setting(None, "Threads of torch on a CPU.  [default: all cores]")
    workers: int | None = setting(None, "What reads and decodes.  [default: all cores beside a GPU, else 1]")
    compile: bool = setting(False, "Let torch.compile make the kernels: minutes once, then faster steps.")
    checkpointing: bool = setting(False, "Compute blocks twice to keep less of them: larger micro-batches.")


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
                f"a warm-up of {self.warmup_epochs} epochs in {self.epochs}", todo="give less --warmup-epochs"
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
