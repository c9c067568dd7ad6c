"""Attention rows over the patches: queries and keys in the base's heads, cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tec_cache.student.heads.head import Branch
from tec_cache.student.masking import Mask
from tec_cache.targets import target_distribution, widened
from tec_cache.types import Targets, TargetSpec


class AttentionHead(Branch):
    """Makes queries of the rows that are targets only, and keys of all patches."""

    kind = "attention"

    def __init__(self, encoder_width: int, width: int, spec: TargetSpec) -> None:
        super().__init__(encoder_width, width, spec)
        self.num_heads = spec.num_heads
        # the base's full width, not its head width: this is what the released program divides by
        self.scale = spec.channels**-0.5

    @staticmethod
    def wanted(spec: TargetSpec) -> bool:
        """A set may have none."""
        return spec.k is not None

    @staticmethod
    def outputs(spec: TargetSpec) -> int:
        """Queries, then keys, each as wide as the base."""
        return 2 * spec.channels

    def predict(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, H, k+1, L) float32 of the class token's row and of `rows` (B, k) over the patches."""
        x, head = self.norm(x), self.head
        query_weight, key_weight = head.weight.chunk(2)
        query_bias, key_bias = head.bias.chunk(2)
        index = torch.cat([rows.new_zeros(rows.shape[0], 1), rows + 1], dim=1)
        asked = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        query = nn.functional.linear(asked, query_weight, query_bias)
        key = nn.functional.linear(x[:, 1:], key_weight, key_bias)
        query, key = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key))
        with torch.autocast(x.device.type, enabled=False):  # products in bfloat16 would round the logits
            return widened(query) @ widened(key).transpose(-2, -1) * self.scale

    def loss(self, x: torch.Tensor, targets: Targets, mask: Mask, tau: float) -> torch.Tensor:
        """Cross entropy, mean over rows and heads."""
        assert targets.attention is not None
        assert targets.rows is not None
        rows = targets.rows.repeat(len(x) // len(targets.rows), 1)
        return attention_loss(self.predict(x, rows), targets.attention, tau)

    def macs(self, spec: TargetSpec, visible: int) -> int:
        """One Linear for each visible token; queries of the asked rows, keys of all patches, and their product."""
        half = self.head.weight.numel() // 2
        return (
            self.embed.weight.numel() * (1 + visible)
            + half * (spec.num_rows + spec.num_tokens)
            + spec.num_rows * spec.num_tokens * spec.channels
        )


def attention_loss(predicted: torch.Tensor, target: torch.Tensor, tau: float) -> torch.Tensor:
    """Cross entropy of softmax(predicted) against softmax(target / tau), summed over the L patch keys.

    predicted: logits (M B, H, k+1, L), row m B + i of view i; target: logits (B, H, k+1, L). Mean over batch, heads
    and all k+1 rows, visible or masked.
    """
    log_probability = F.log_softmax(widened(predicted), dim=-1).unflatten(0, (-1, len(target)))
    return -(target_distribution(target, tau) * log_probability).sum(dim=-1).mean()
