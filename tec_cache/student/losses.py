"""The two losses. They see predictions and targets, never where the targets came from."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tec_cache.student.masking import Mask
from tec_cache.targets import target_distribution


def feature_loss(predicted: torch.Tensor, target: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Mean squared error over channels and over the masked patches of the batch.

    predicted: (M B, L - V, C) of the masked patches in the mask's order, row m B + i of view i;
    target: (B, L, C), normalized.
    """
    view = torch.arange(len(predicted), device=target.device)[:, None] % len(target)
    return F.mse_loss(predicted.float(), target[view, mask.masked].float())


def attention_loss(predicted: torch.Tensor, target: torch.Tensor, tau: float) -> torch.Tensor:
    """Cross entropy of softmax(predicted) against softmax(target / tau), summed over the L patch keys.

    predicted: logits (M B, H, k+1, L), row m B + i of view i; target: logits (B, H, k+1, L). Mean over batch, heads
    and all k+1 rows, visible or masked.
    """
    log_probability = F.log_softmax(predicted.float(), dim=-1).unflatten(0, (-1, len(target)))
    return -(target_distribution(target, tau) * log_probability).sum(dim=-1).mean()
