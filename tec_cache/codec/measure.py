"""How far decoded targets are from exact ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tec_cache.types import Targets, TargetSpec


class TargetErrors:
    """Collects the errors of decoded targets, batch by batch.

    mse: squared error of the features over their energy about each channel's mean (which patch normalization
    makes zero), over all views together. kl: divergence of the decoded attention rows from the exact ones in
    nats at temperature `tau`, mean over rows, heads and views.
    """

    def __init__(self, spec: TargetSpec, tau: float = 1.0) -> None:
        self.spec, self.tau = spec, tau
        self.views = 0
        self._error: list[torch.Tensor] = []
        self._kl: list[torch.Tensor] = []
        self._sum = torch.zeros(spec.channels, dtype=torch.float64)
        self._square = 0.0

    def add(self, exact: Targets, decoded: Targets) -> None:
        """Count a batch. Features (B, L, C); attention (B, H, k+1, L) as logits, known up to a constant per row."""
        self.views += len(exact.features)
        features = exact.features.double()
        self._error.append((features - decoded.features.double()).square().sum((1, 2)).cpu())
        self._sum += features.sum((0, 1)).cpu()
        self._square += float(features.square().sum())
        if self.spec.num_rows:
            assert exact.attention is not None
            assert decoded.attention is not None
            p, q = ((x.attention.double() / self.tau).log_softmax(-1) for x in (exact, decoded))  # type: ignore[union-attr]
            self._kl.append((p.exp() * (p - q)).sum(-1).mean((1, 2)).cpu())

    @property
    def energy(self) -> float:
        """Energy of the features of a view about the channels' means, on average."""
        tokens = self.views * self.spec.num_tokens
        return (self._square - float(self._sum.square().sum()) / tokens) / self.views

    @property
    def mse_of_views(self) -> torch.Tensor:
        """Relative error of each view (N,) float64; their mean is the relative mean squared error."""
        return torch.cat(self._error) / max(self.energy, 1e-30)

    @property
    def kl_of_views(self) -> torch.Tensor:
        """Divergence of each view (N,) float64; empty without an attention target."""
        return torch.cat(self._kl) if self._kl else torch.empty(0, dtype=torch.float64)

    def summary(self) -> dict[str, float]:
        """Return mse, kl (where there is attention), the worst view's, and the deviation among views."""
        found: dict[str, float] = {}
        for name, values in (("mse", self.mse_of_views), ("kl", self.kl_of_views)):
            if len(values):
                deviation = float(values.std()) if len(values) > 1 else 0.0
                found |= {name: float(values.mean()), f"{name}_max": float(values.max()), f"{name}_std": deviation}
        return {name: float(f"{value:.6g}") for name, value in found.items()}
