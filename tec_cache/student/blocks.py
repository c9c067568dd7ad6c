"""How a transformer block is run: as it is, or with its inside computed a second time in the place of kept."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: torch.Tensor, checkpointing: bool, *, draws: bool) -> torch.Tensor:
    """Apply a block to tokens (B, N, C).

    checkpointing: keep nothing of its inside for the backward pass, which computes it again: the same gradients
    for a third more arithmetic in the block and a fraction of its memory. draws: whether the block draws random
    numbers, see `draws`; only then are the generators' states kept at each block, for the second time.
    """
    if not checkpointing:
        return block(x)  # type: ignore[no-any-return]
    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=draws)  # type: ignore[no-any-return]


def draws(module: nn.Module) -> bool:
    """Say whether a module draws random numbers while it is trained: by dropout, or by leaving blocks out."""
    return any(
        (isinstance(part, nn.Dropout) and part.p > 0) or (isinstance(part, DropPath) and bool(part.drop_prob))
        for part in module.modules()
    )
