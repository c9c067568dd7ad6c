"""The three optimizers of the recipes, over groups with scales; the schedule is `run.optimizer.create_schedule`."""

from __future__ import annotations

from typing import get_args

import torch
from timm.optim.lars import Lars

from tec_cache.errors import ConfigError, nearest
from tec_cache.finetune.groups import Group
from tec_cache.finetune.recipes import OptimizerName

TRUST = 0.001
"""LARS's share of a weight's norm that a step of learning rate 1 may move it."""


def create_optimizer(
    name: OptimizerName, groups: list[Group], *, lr: float, momentum: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Create AdamW in one kernel, SGD with momentum, or LARS over `parameter_groups`.

    lr: the peak of a group whose lr_scale is 1; every group starts at its own share of it, and timm's schedules keep to
    that. momentum: of SGD and LARS. betas: of AdamW. Raises ConfigError.
    """
    if name not in get_args(OptimizerName):
        known = get_args(OptimizerName)
        raise ConfigError(f"unknown optimizer {name!r}{nearest(str(name), known)}", todo=f"one of {', '.join(known)}")
    if name == "lars":
        return _scaled(Lars(_adapting(groups), lr=lr, momentum=momentum, trust_coeff=TRUST))
    fresh = [dict(group) for group in groups]
    if name == "sgd":
        return _scaled(torch.optim.SGD(fresh, lr=lr, momentum=momentum))
    return _scaled(torch.optim.AdamW(fresh, lr=lr, betas=betas, fused=True))


def _scaled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Remember the peak for the schedules, and give each group its share until one of them does."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        group["lr"] *= group["lr_scale"]
    return optimizer


def _adapting(groups: list[Group]) -> list[Group]:
    """Part tensors of one dimension, which LARS neither adapts nor decays, from the others, which it always adapts.

    timm's Lars adapts by itself only where there is weight decay, and a linear probe has none.
    """
    out = []
    for group in groups:
        for flat in (False, True):
            chosen = [i for i, p in enumerate(group["params"]) if (p.ndim <= 1) == flat]
            if chosen:
                part = {key: [group[key][i] for i in chosen] for key in ("params", "names")}
                decay = 0.0 if flat else group["weight_decay"]
                out.append(group | part | {"weight_decay": decay, "always_adapt": not flat})
    return out
