"""The two adapters between encoder and decoder: what lets the student stay itself while it meets the targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tec_cache.errors import ConfigError
from tec_cache.printable import counted
from tec_cache.targets import widened

GROUP = 3
"""Consecutive layers that share one encoder adapter."""


class Mlp(nn.Module):
    """Linear(width, hidden) - GELU (erf) - Linear(hidden, width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) to (..., width)."""
        out: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class EncoderAdapters(nn.Module):
    """Fuse the outputs of all blocks into Z_e, what the decoder reads.

    Concatenated in depth order, LayerNorm, split in groups of three consecutive layers; per group
    Z_n = Linear(3C, C), Z'_n = Z_n + MLP(Z_n); Z_e = LayerNorm(sum of Z'_n). Both norms have eps 1e-5.
    """

    def __init__(self, depth: int, width: int, hidden: int) -> None:
        super().__init__()
        if depth % GROUP:
            raise ConfigError(
                f"{counted(depth, 'layer')} cannot be divided into groups of {GROUP}, which encoder adapters take",
                todo=f"use an encoder whose depth is a multiple of {GROUP}, or --adapters input",
            )
        self.norm_before = nn.LayerNorm(depth * width, eps=1e-5)
        self.fuse = nn.ModuleList(nn.Linear(GROUP * width, width) for _ in range(depth // GROUP))
        self.mlps = nn.ModuleList(Mlp(width, hidden) for _ in range(depth // GROUP))
        self.norm_after = nn.LayerNorm(width, eps=1e-5)

    def contributions(self, layers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return Z'_n of each group; `layers` are the outputs (B, N, C) of all blocks, in depth order."""
        stacked = self.norm_before(torch.cat(list(layers), dim=-1))
        outputs = []
        for part, fuse, mlp in zip(stacked.chunk(len(self.fuse), dim=-1), self.fuse, self.mlps, strict=True):
            fused = fuse(part)
            outputs.append(fused + mlp(fused))
        return outputs

    def forward(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return Z_e (B, N, C)."""
        parts = self.contributions(layers)
        total = widened(parts[0])  # under autocast the parts are bfloat16, their sum need not be
        for part in parts[1:]:
            total = total + part
        out: torch.Tensor = self.norm_after(total)
        return out
