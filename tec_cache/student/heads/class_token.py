"""The base's class token: a LayerNorm and a Linear on the student's own, squared error."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tec_cache.student.heads.head import EPS, Head
from tec_cache.student.masking import Mask
from tec_cache.targets import widened
from tec_cache.types import Targets, TargetSpec


class ClassHead(Head):
    """Predicts what the base says of the whole view from the class token of Z_e, which has seen the visible patches.

    No branch of the decoder: its blocks are there to fill in patches, and would be half as many tokens again.
    """

    kind = "class"
    branch = False

    def __init__(self, encoder_width: int, width: int, spec: TargetSpec) -> None:
        super().__init__(encoder_width, width, spec)
        self.norm = nn.LayerNorm(encoder_width, eps=EPS)
        self.head = nn.Linear(encoder_width, spec.channels)

    @staticmethod
    def wanted(spec: TargetSpec) -> bool:
        """A set has it where it was asked for."""
        return spec.class_token

    def predict(self, encoded: torch.Tensor) -> torch.Tensor:
        """Return class tokens (M B, C_base) of Z_e (M B, 1 + V, C)."""
        out: torch.Tensor = self.head(self.norm(encoded[:, 0]))
        return out

    def loss(self, x: torch.Tensor, targets: Targets, mask: Mask, tau: float) -> torch.Tensor:
        """Mean squared error over channels."""
        assert targets.class_token is not None
        return class_loss(self.predict(x), targets.class_token)

    def macs(self, spec: TargetSpec, visible: int) -> int:
        """One Linear for one token."""
        return self.head.weight.numel()


def class_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error. predicted: (M B, C), row m B + i of view i; target: (B, C), normalized over its channels."""
    return F.mse_loss(widened(predicted), widened(target).repeat(len(predicted) // len(target), 1))
