"""How far decoded targets are from the exact ones: the two figures that a quality is stated in."""

from __future__ import annotations

import torch

from tec_cache.types import Targets


class TargetErrors:
    """Collects the errors of decoded targets, batch by batch.

    mse: squared error of the features over their energy about each channel's mean (which patch normalization
    makes zero), over all views together. kl: divergence of the decoded attention rows from the exact ones in
    nats at temperature `tau`, mean over rows, heads and views. class: squared error of the class tokens over their
    energy.
    """

    def __init__(self, tau: float = 1.0) -> None:
        self.tau = tau
        self._error: list[torch.Tensor] = []
        self._kl: list[torch.Tensor] = []
        self._class: list[torch.Tensor] = []
        self._tokens = 0
        self._sum: torch.Tensor | float = 0.0
        self._square = 0.0

    def add(self, exact: Targets, decoded: Targets) -> None:
        """Count a batch. Features (B, L, C); attention (B, H, k+1, L) as logits, known up to a constant per row."""
        features = exact.features.double()
        self._error.append((features - decoded.features.double()).square().sum((1, 2)).cpu())
        self._tokens += features.shape[0] * features.shape[1]
        self._sum = self._sum + features.sum((0, 1)).cpu()
        self._square += float(features.square().sum())
        if exact.attention is not None:
            assert decoded.attention is not None
            self._kl.append(row_divergence(exact.attention, decoded.attention, self.tau).mean((1, 2)).cpu())
        if exact.class_token is not None:
            assert decoded.class_token is not None
            token = exact.class_token.double()
            error = (token - decoded.class_token.double()).square().sum(1)
            self._class.append((error / token.square().sum(1).clamp(min=1e-30)).cpu())

    @property
    def energy(self) -> float:
        """Energy of the features of a view about the channels' means, on average."""
        common = float(torch.as_tensor(self._sum).square().sum()) / self._tokens
        return (self._square - common) / sum(len(errors) for errors in self._error)

    @property
    def mse_of_views(self) -> torch.Tensor:
        """Relative error of each view (N,) float64; their mean is the relative mean squared error."""
        return torch.cat(self._error) / max(self.energy, 1e-30)

    @property
    def kl_of_views(self) -> torch.Tensor:
        """Divergence of each view (N,) float64; empty without an attention target."""
        return torch.cat(self._kl) if self._kl else torch.empty(0, dtype=torch.float64)

    @property
    def class_of_views(self) -> torch.Tensor:
        """Relative error of each view's class token (N,) float64; empty without such a target."""
        return torch.cat(self._class) if self._class else torch.empty(0, dtype=torch.float64)

    @property
    def mse(self) -> float:
        """Relative mean squared error of the features."""
        return float(self.mse_of_views.mean())

    @property
    def kl(self) -> float | None:
        """Mean divergence of the attention rows, nats; None without an attention target."""
        return float(self.kl_of_views.mean()) if self._kl else None

    def _by_view(self) -> tuple[tuple[str, torch.Tensor], ...]:
        return ("mse", self.mse_of_views), ("kl", self.kl_of_views), ("class", self.class_of_views)

    def summary(self) -> dict[str, float]:
        """Return mse, kl and class (where there are such targets), the worst view's, and the deviation among views."""
        found: dict[str, float] = {}
        for name, values in self._by_view():
            if len(values):
                deviation = float(values.std()) if len(values) > 1 else 0.0
                found |= {name: float(values.mean()), f"{name}_max": float(values.max()), f"{name}_std": deviation}
        return {name: float(f"{value:.6g}") for name, value in found.items()}


def target_errors(exact: Targets, decoded: Targets, tau: float = 1.0) -> TargetErrors:
    """Return the errors of one batch."""
    errors = TargetErrors(tau)
    errors.add(exact, decoded)
    return errors


def row_divergence(exact: torch.Tensor, decoded: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """KL(softmax(exact / tau) || softmax(decoded / tau)) of logits (..., L): (...) float64, nats."""
    p = (exact.double() / tau).log_softmax(dim=-1)
    q = (decoded.double() / tau).log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)
