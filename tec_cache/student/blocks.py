"""How a transformer block is run: as it is, or with its inside computed a second time in the place of kept."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    """Apply a block to tokens (B, N, C).

    checkpointing: keep nothing of its inside for the backward pass, which computes it again: the same gradients
    for a third more arithmetic in the block and a fraction of its memory.
    """
    out: torch.Tensor = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
    return out
