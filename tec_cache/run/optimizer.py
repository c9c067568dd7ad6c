"""AdamW and the schedule of the pretraining recipe, from timm."""

from __future__ import annotations

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn


def create_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW in one kernel; no decay on biases, norms and other 1-D parameters. Frozen parameters are left out."""
    return torch.optim.AdamW(param_groups_weight_decay(model, weight_decay), lr=lr, betas=betas, fused=True)


def create_schedule(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_steps: int, min_lr: float
) -> CosineLRScheduler:
    """Linear warm-up from 0, then half a cosine to `min_lr`; call `step_update(step)` before step `step`."""
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, total_steps - warmup_steps),
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Return base_lr * batch / 256, the linear scaling rule of the recipe."""
    return base_lr * batch_size / 256


def gradient_norm(model: nn.Module, limit: float | None) -> torch.Tensor:
    """Return the norm of all gradients; with a limit, scale them down to it first."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if limit is not None:
        return nn.utils.clip_grad_norm_(parameters, limit)
    return nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
