"""Features of the masked patches: a Linear to the base's width, squared error."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tec_cache.student.heads.head import Branch
from tec_cache.student.masking import Mask
from tec_cache.targets import widened
from tec_cache.types import Targets, TargetSpec


class FeatureHead(Branch):
    """Looks at masked patches only, because the loss needs no others."""

    kind = "feature"

    @staticmethod
    def wanted(spec: TargetSpec) -> bool:
        """Every set has features."""
        return True

    @staticmethod
    def outputs(spec: TargetSpec) -> int:
        """As wide as the base."""
        return spec.channels

    def predict(self, x: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Return the features (B, L - V, C_base) of the masked patches, in the mask's order."""
        patches = x[:, 1:]
        masked = patches.gather(1, mask.masked[..., None].expand(-1, -1, patches.shape[-1]))
        out: torch.Tensor = self.head(self.norm(masked))
        return out

    def loss(self, x: torch.Tensor, targets: Targets, mask: Mask, tau: float) -> torch.Tensor:
        """Mean squared error over channels and masked patches."""
        return feature_loss(self.predict(x, mask), targets.features, mask)

    def macs(self, spec: TargetSpec, visible: int) -> int:
        """One Linear for each visible token, another for each masked patch."""
        return self.embed.weight.numel() * (1 + visible) + self.head.weight.numel() * (spec.num_tokens - visible)


def feature_loss(predicted: torch.Tensor, target: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Mean squared error over channels and over the masked patches of the batch.

    predicted: (M B, L - V, C) of the masked patches in the mask's order, row m B + i of view i;
    target: (B, L, C), normalized.
    """
    view = torch.arange(len(predicted), device=target.device)[:, None] % len(target)
    return F.mse_loss(widened(predicted), widened(target[view, mask.masked]))
