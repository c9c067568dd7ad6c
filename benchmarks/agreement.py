"""How far two ways of computing the same step agree: their losses, and the directions of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEGLIGIBLE = 1e-4
"""Share of a gradient's norm under which the direction of one parameter's part says nothing: a bias of a key, say,
whose gradient is zero but for rounding."""


@dataclass(frozen=True)
class Step:
    """Losses and gradients of one forward and backward pass; the gradients lie on the CPU, in float64."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """Two steps compared.

    losses: relative difference of each. cosine: between the whole gradients. lowest: the parameter whose own part
    agrees least, and its cosine, among those that have more than `NEGLIGIBLE` of the gradient.
    """

    losses: dict[str, float]
    cosine: float
    lowest: tuple[str, float]


def taken(module: nn.Module, losses: Mapping[str, Tensor]) -> Step:
    """Run the backward pass of "loss"; return the losses and the gradients, and leave the module without any."""
    module.zero_grad(set_to_none=True)
    losses["loss"].backward()
    found = {name: p.grad.detach().double().cpu() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return Step({name: float(value.detach()) for name, value in losses.items()}, found)


def agreement(reference: Step, other: Step) -> Agreement:
    """Compare a step with its reference. ValueError where they have gradients of different parameters."""
    if reference.gradients.keys() != other.gradients.keys():
        raise ValueError(f"gradients of one only: {sorted(reference.gradients.keys() ^ other.gradients.keys())}")
    losses = {name: abs(other.losses[name] / value - 1) for name, value in reference.losses.items()}
    ours, theirs = (torch.cat([g.flatten() for g in step.gradients.values()]) for step in (other, reference))
    whole = float(theirs.norm())
    each = {
        name: _cosine(other.gradients[name].flatten(), gradient.flatten())
        for name, gradient in reference.gradients.items()
        if float(gradient.norm()) > NEGLIGIBLE * whole
    }
    lowest = min(each, key=lambda name: each[name])
    return Agreement(losses, _cosine(ours, theirs), (lowest, each[lowest]))


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))
