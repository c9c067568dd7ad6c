"""What the loop asks of a task. Adding one is a file beside this one, a program, and a row in the table of commands."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import torch
from torch import nn

from tec_cache.run.feed import B


class Task(Protocol[B]):
    """Something to train: the loop knows nothing else of it."""

    name: str
    """As it stands in run.json."""
    module: nn.Module
    """All that is trained or saved; its state_dict is what a checkpoint holds."""
    terms: tuple[str, ...]
    """Names of what `losses` returns, "loss" first."""
    steps_per_epoch: int
    micro_batches: int
    """Batches that a process takes for one step."""
    draws: bool
    """Whether a step draws from torch's generator, which is then seeded from (seed, step, rank)."""
    judged_every: int
    """Epochs between two calls of `evaluate`, which also ends a training; 0 where it has nothing to say."""

    def batches(self, start_step: int, stop_step: int) -> Generator[B, None, None]:
        """Yield this rank's batches of steps start..stop, counted over all epochs, `micro_batches` for each."""

    def losses(self, model: nn.Module, batch: B) -> dict[str, torch.Tensor]:
        """Return the losses of one micro-batch, scalars named as in `terms`; "loss" is what is minimized.

        model: the module, or what makes its gradients travel between processes.
        """

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Create the optimizer over the module's groups of parameters.

        lr: the peak of the schedule; "lr_scale" of a group multiplies it, at every step.
        """

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Judge the module; every rank calls it, all get the same numbers. Weights and generators stay as they are."""

    def figures(self) -> dict[str, float]:
        """Return what else belongs into the next line of the log; nothing where there is nothing."""

    def note(self) -> str:
        """Return a few words for the progress line; empty where there is nothing to say."""
