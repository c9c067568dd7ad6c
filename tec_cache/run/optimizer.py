"""The schedule of the recipes, from timm; and what a checkpoint keeps of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from tec_cache.errors import listed
from tec_cache.run.checkpoint import require_tensors, unfit

KEPT = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",), "Lars": ("momentum_buffer",)}
"""Optimizer -> what it holds of each parameter."""
MOST_COUNTED = 2**24
"""AdamW counts its steps in float32, which ends here."""


def create_schedule(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_steps: int, min_lr: float, kind: str = "cosine"
) -> Scheduler:
    """Linear warm-up from 0, then half a cosine or a line to `min_lr`; call `step_update(step)` before step `step`.

    kind: cosine or linear.
    """
    shared: dict[str, Any] = {
        "t_initial": max(1, total_steps - warmup_steps),
        "lr_min": min_lr,
        "warmup_t": warmup_steps,
        "warmup_lr_init": 0.0,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if kind == "linear":
        return PolyLRScheduler(optimizer, power=1.0, **shared)
    return CosineLRScheduler(optimizer, **shared)


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Return base_lr * batch / 256, the linear scaling rule of the recipe."""
    return base_lr * batch_size / 256


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return what the optimizer holds of each trained parameter, by the parameter's name: see `KEPT`.

    The rest, learning rates and the like, follows from the run's settings.
    """
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[Any, Any], *, step: int, path: Path
) -> None:
    """Take up `optimizer_state` as it was after `step` steps.

    Raises TecCacheError for a parameter that is missing or left over, and for tensors that do not fit it, are not
    finite, or are of another step. The optimizer is then untouched.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(state) != set(trained) or any(not isinstance(entry, dict) for entry in state.values()):
        odd = sorted(map(str, set(state) ^ set(trained))) or ["entries that are no tables"]
        raise unfit(path, f"the optimizer's parameters are not the model's; they differ in {listed(odd)}")
    kept = KEPT[type(optimizer).__name__]
    for name, p in trained.items():
        wanted = {n: (torch.Size(), torch.float32) if n == "step" else (p.shape, p.dtype) for n in kept}
        require_tensors(state[name], wanted, path, f"the optimizer's {name}")
        if "step" in kept and int(state[name]["step"]) != min(step, MOST_COUNTED):
            raise unfit(path, f"the optimizer's {name} is of step {int(state[name]['step'])}, the checkpoint of {step}")
        if "exp_avg_sq" in kept and (state[name]["exp_avg_sq"] < 0).any():
            raise unfit(path, f"exp_avg_sq of the optimizer's {name} is negative")
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    by_number = {numbers[id(p)]: state[name] for name, p in trained.items()}
    optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})


def gradient_norm(model: nn.Module, limit: float | None) -> torch.Tensor:
    """Return the norm of all gradients; with a limit, scale them down to it first."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if limit is not None:
        return nn.utils.clip_grad_norm_(parameters, limit)
    return nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
