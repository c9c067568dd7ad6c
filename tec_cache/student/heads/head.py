"""What every kind of target has: a place where it reads the student, a way out, and a loss."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from tec_cache.student.masking import Mask
from tec_cache.types import Targets, TargetSpec

EPS = 1e-6


class Head(nn.Module):
    """One kind of target of one set.

    A kind says whether a set has it (`wanted`), where it reads the student (`branch`), and its loss.
    """

    kind: ClassVar[str]
    """Its name: of its loss, and of its weights."""
    branch: ClassVar[bool]
    """Whether it is a `Branch` of the decoder; else it reads what the encoder and its adapters give, Z_e."""

    def __init__(self, encoder_width: int, width: int, spec: TargetSpec) -> None:
        """encoder_width, width: of Z_e's tokens and of the decoder's."""
        super().__init__()

    @staticmethod
    def wanted(spec: TargetSpec) -> bool:
        """Say whether a set of targets has this kind."""
        raise NotImplementedError

    def loss(self, x: torch.Tensor, targets: Targets, mask: Mask, tau: float) -> torch.Tensor:
        """Return the loss, a float32 scalar.

        x: (M B, 1 + L, width), what the shared blocks made of a branch's tokens, or Z_e (M B, 1 + V, C). targets: of B
        views, M masks of each: row m B + i of x is mask m of view i. tau: of the set's attention.
        """
        raise NotImplementedError

    def macs(self, spec: TargetSpec, visible: int) -> int:
        """Return the multiply-accumulates outside the decoder's blocks, for one view of which so many are visible."""
        raise NotImplementedError


class Branch(Head):
    """A branch of the decoder: Linear, mask token, then the shared blocks, final LayerNorm, Linear."""

    branch = True

    def __init__(self, encoder_width: int, width: int, spec: TargetSpec) -> None:
        super().__init__(encoder_width, width, spec)
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, self.outputs(spec))

    @staticmethod
    def outputs(spec: TargetSpec) -> int:
        """Return the width of the last Linear."""
        raise NotImplementedError

    def tokens(self, encoded: torch.Tensor, mask: Mask, position: torch.Tensor) -> torch.Tensor:
        """Put the visible tokens (B, 1 + V, C) in their places, mask tokens elsewhere: (B, 1 + L, width)."""
        x = self.embed(encoded)
        num_masked = mask.order.shape[1] - mask.num_visible
        fill = self.mask_token.to(x.dtype).expand(x.shape[0], num_masked, -1)
        patches = torch.cat([x[:, 1:], fill], dim=1)
        patches = patches.gather(1, mask.restore[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :1], patches], dim=1) + position
