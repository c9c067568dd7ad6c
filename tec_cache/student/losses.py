"""The two losses. They see predictions and targets, never where the targets came from."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tec_cache.student.masking import Mask
from tec_cache.targets import target_distribution


def feature_loss(predicted: torch.Tensor, target: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Mean squared error over channels and over the masked patches of the batch.

    predicted: (B, L - V, C) of the masked patches in the mask's order; target: (B, L, C), normalized.
    """
    target = target.gather(1, mask.masked[..., None].expand(-1, -1, target.shape[-1]))
    return F.mse_loss(predicted.float(), target.float())


def attention_loss(predicted: torch.Tensor, target: torch.Tensor, tau: float) -> torch.Tensor:
    """Cross entropy of softmax(predicted) against softmax(target / tau), summed over the L patch keys.

    predicted, target: logits (B, H, k+1, L). Mean over batch, heads and all k+1 rows, visible or masked.
    """
    log_probability = F.log_softmax(predicted.float(), dim=-1)
    return -(target_distribution(target, tau) * log_probability).sum(dim=-1).mean()
