"""How hard each of several target sets pulls at the encoder: its gradient's norm, and weights that equalize the norms.

A base with a steeper loss, or more losses, would have the encoder for itself: the norms say so, and `--balance norm`
divides each set's weight by the running mean of its norm. That is GradNorm (Chen et al., 2018; arXiv 1711.02257) with
the ratio of training rates left out: all norms are drawn to one, at once rather than by a loss of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tec_cache.distributed import Ranks
from tec_cache.student.masking import Mask
from tec_cache.student.model import Student
from tec_cache.types import Targets

FIRST = 8
"""Steps at the beginning that are all measured: norms change most there."""
EVERY = {"none": 500, "norm": 50}
"""Steps between two measurements, by what is made of them. One takes about as long as a step's forward pass and the
decoder's backward passes."""
KEPT = 0.9
"""Share of the running mean that a measurement leaves as it is."""
DWARFED = 10.0
"""Ratio of two sets' norms, their weights counted, that is worth a word."""


def is_measured(step: int, balance: str) -> bool:
    """Say whether the gradients of a step, counted from 0, are measured."""
    return step < FIRST or step % EVERY[balance] == 0


def dwarfed(gradients: Mapping[str, float]) -> str:
    """Say which set's gradient norm is more than DWARFED times which other's; empty where none is."""
    norms = {name: norm for name, norm in gradients.items() if math.isfinite(norm) and norm > 0}
    if len(norms) < 2:
        return ""
    most, least = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    ratio = norms[most] / norms[least]
    return f"the gradient of {most} is {ratio:.0f} times that of {least}" if ratio > DWARFED else ""


def gradient_norms(
    student: Student,
    images: torch.Tensor,
    targets: Mapping[str, Targets],
    mask: Mask,
    weights: Mapping[str, Mapping[str, float]],
) -> torch.Tensor:
    """Return how hard each set pulls at what the encoder gives, the outputs of all its blocks: (S,) float32.

    It is the norm of the gradient of one masked view's loss, root mean square over the views: the same for any number
    of views and, over all ranks, of processes.
    weights: set -> name of a loss -> its weight among that set's. No gradient of any parameter is touched.
    """
    with torch.no_grad():
        layers = student.forward_layers(images, mask)
    leaves = [layer.detach().requires_grad_() for layer in layers]
    losses = student.judged(leaves, targets, mask)
    norms = []
    for of_set in weights.values():
        total = sum((weight * losses[name] for name, weight in of_set.items()), torch.zeros((), device=images.device))
        found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        square = torch.stack([g.float().square().sum() for g in found if g is not None]).sum()
        norms.append((square * len(mask.order)).sqrt())  # each loss is a mean over so many
    return torch.stack(norms)


class SetGradients:
    """The gradient norms of the sets of one training, as they were last measured.

    running: (S,) float32, running means, where the weights follow them; a buffer of the student, which a checkpoint
    holds. 0 before the first measurement.
    """

    def __init__(self, weights: Mapping[str, float], ranks: Ranks, running: torch.Tensor | None = None) -> None:
        self.weights, self.ranks, self.running = dict(weights), ranks, running
        self.last: dict[str, float] = {}
        """Of the sets' losses as they are weighted in the sum."""
        self.fresh = False
        """Whether `last` was not taken yet."""
        self._factors: dict[str, float] | None = None

    def add(self, norms: torch.Tensor) -> None:
        """Take a measurement (S,) of unweighted losses, this rank's; all ranks call it. It waits for the device."""
        if self.ranks.world_size > 1:
            norms = norms.square()
            torch.distributed.all_reduce(norms)
            norms = (norms / self.ranks.world_size).sqrt()
        if self.running is not None and bool(norms.isfinite().all()):
            first = self.running == 0
            self.running.copy_(torch.where(first, norms, torch.lerp(norms, self.running, KEPT)))
            self._factors = None
        factors = self.factors()
        self.last = {name: factors[name] * norm for name, norm in zip(self.weights, norms.tolist(), strict=True)}
        self.fresh = True

    def factors(self) -> dict[str, float]:
        """Return the weight of each set: the given one, divided by its running norm where these are followed.

        Their sum stays that of the given ones, so the learning rate means the same.
        """
        if self.running is None:
            return self.weights
        if self._factors is None:
            norms = self.running.tolist()
            if min(norms) > 0:
                shares = {name: w / norm for (name, w), norm in zip(self.weights.items(), norms, strict=True)}
                scale = sum(self.weights.values()) / sum(shares.values())
                self._factors = {name: scale * share for name, share in shares.items()}
            else:  # not measured yet, or a set that asks for nothing any more
                self._factors = self.weights
        return self._factors

    def figures(self) -> dict[str, float]:
        """Return what was measured since this was last asked, for the log: "NAME/gradient", and "NAME/weight"."""
        if not self.fresh:
            return {}
        self.fresh = False
        found = {f"{name}/gradient": norm for name, norm in self.last.items()}
        if self.running is not None:
            found |= {f"{name}/weight": weight for name, weight in self.factors().items()}
        return found

    def note(self) -> str:
        """Say which set's gradient dwarfs which; empty where none does."""
        return dwarfed(self.last)
