"""How far decoded targets are from the exact ones: the two figures that a quality is stated in."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tec_cache.types import Targets


class TargetErrors(NamedTuple):
    """Errors of a batch, one value per view, float64 on the targets' device; batches are joined with `join_errors`."""

    error: torch.Tensor
    """(B) summed squared difference of the features."""
    energy: torch.Tensor
    """(B) summed square of the exact features without the mean that was given."""
    kl: torch.Tensor | None
    """(B) mean over the attention rows of KL(exact || decoded), nats; None without an attention target."""

    @property
    def relative_mse(self) -> float:
        """Error over energy, both summed over the views: the headline number."""
        return float(self.error.sum() / self.energy.sum())

    @property
    def relative_mse_per_view(self) -> torch.Tensor:
        """(B) error of each view over the mean energy of a view, so that their mean is `relative_mse`."""
        return self.error / self.energy.mean()

    @property
    def mean_kl(self) -> float | None:
        """Mean over views and rows, nats."""
        return None if self.kl is None else float(self.kl.mean())


def target_errors(
    exact: Targets, decoded: Targets, *, mean: torch.Tensor | None = None, tau: float = 1.0
) -> TargetErrors:
    """Compare decoded targets with the exact normalized ones.

    mean: (C), what every token has in common, which no transform has to code: the codec's channel means, or None
    for zero. It matters only where the normalization is not per patch. tau: temperature of both distributions.
    """
    features = exact.features.float()
    error = (features - decoded.features.float()).square().sum(dim=(1, 2), dtype=torch.float64)
    centred = features if mean is None else features - mean
    energy = centred.square().sum(dim=(1, 2), dtype=torch.float64)
    if exact.attention is None or decoded.attention is None:
        return TargetErrors(error, energy, None)
    return TargetErrors(error, energy, row_divergence(exact.attention, decoded.attention, tau).mean(dim=(1, 2)))


def row_divergence(exact: torch.Tensor, decoded: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """KL(softmax(exact / tau) || softmax(decoded / tau)) of logits (..., L): (...) float64, nats."""
    p = (exact.double() / tau).log_softmax(dim=-1)
    q = (decoded.double() / tau).log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def join_errors(parts: list[TargetErrors]) -> TargetErrors:
    """Put the errors of several batches together."""
    kl = [part.kl for part in parts if part.kl is not None]
    return TargetErrors(
        torch.cat([part.error for part in parts]),
        torch.cat([part.energy for part in parts]),
        torch.cat(kl) if kl else None,
    )
