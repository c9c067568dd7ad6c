"""The multi-target decoder: transformer blocks that all branches of all target sets share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import Block
from torch import nn

from tec_cache.student.blocks import run_block
from tec_cache.student.heads.head import EPS
from tec_cache.student.position import sincos_position


class Decoder(nn.Module):
    """Positions and blocks; what goes in and comes out belongs to the heads."""

    def __init__(self, *, grid: int, width: int, depth: int, heads: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.position = nn.Parameter(sincos_position(width, grid), requires_grad=False)
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=_Norm) for _ in range(depth)
        )

    def forward(self, branches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Send the tokens of all branches, each (B, 1 + L, width), through the blocks in one batch."""
        x = torch.cat(list(branches))
        for block in self.blocks:
            x = run_block(block, x, self.checkpointing, draws=False)
        return list(x.chunk(len(branches)))


class _Norm(nn.LayerNorm):
    """LayerNorm with the eps of the whole student; timm's own default has changed before."""

    def __init__(self, width: int, **_: object) -> None:
        super().__init__(width, eps=EPS)
