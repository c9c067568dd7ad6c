"""The multi-target decoder: a branch per target, transformer blocks shared by both."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import nn

from tec_cache.student.blocks import run_block
from tec_cache.student.masking import Mask
from tec_cache.student.position import sincos_position

EPS = 1e-6


class Branch(nn.Module):
    """One target's way in and out of the shared blocks: Linear, mask token, final LayerNorm, head."""

    def __init__(self, encoder_width: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, outputs)

    def tokens(self, encoded: torch.Tensor, mask: Mask, position: torch.Tensor) -> torch.Tensor:
        """Put the visible tokens (B, 1 + V, C) in their places, mask tokens elsewhere: (B, 1 + L, width)."""
        x = self.embed(encoded)
        num_masked = mask.order.shape[1] - mask.num_visible
        fill = self.mask_token.to(x.dtype).expand(x.shape[0], num_masked, -1)
        patches = torch.cat([x[:, 1:], fill], dim=1)
        patches = patches.gather(1, mask.restore[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :1], patches], dim=1) + position


class Decoder(nn.Module):
    """Predict features and attention rows from Z_e.

    Both branches go through the shared blocks in one batch. The feature head only looks at masked patches
    and the attention head only at the rows that are targets, because the losses need no others.
    """

    def __init__(
        self,
        *,
        grid: int,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        channels: int,
        attention_heads: int,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.position = nn.Parameter(sincos_position(width, grid), requires_grad=False)
        self.feature = Branch(encoder_width, width, channels)
        self.attention = Branch(encoder_width, width, 2 * channels) if attention_heads else None
        self.attention_heads, self.checkpointing = attention_heads, checkpointing
        # the base's full width, not its head width: this is what the released program divides by
        self.attention_scale = channels**-0.5
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=_Norm) for _ in range(depth)
        )

    def forward(
        self, encoded: torch.Tensor, mask: Mask, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features of the masked patches (B, L - V, C_base) and logits (B, H, k+1, L) or None.

        encoded: (B, 1 + V, C). rows: (B, k) patches whose attention rows are wanted beside the class token's.
        """
        branches = [self.feature] if self.attention is None or rows is None else [self.feature, self.attention]
        x = torch.cat([branch.tokens(encoded, mask, self.position) for branch in branches])
        for block in self.blocks:
            x = run_block(block, x, self.checkpointing, draws=False)
        parts = x.chunk(len(branches))

        patches = parts[0][:, 1:]
        masked = patches.gather(1, mask.masked[..., None].expand(-1, -1, patches.shape[-1]))
        features = self.feature.head(self.feature.norm(masked))
        if self.attention is None or rows is None:
            return features, None
        return features, self._attention(self.attention.norm(parts[1]), rows)

    def _attention(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits of the class token's row and of `rows` over the patch keys, float32."""
        assert self.attention is not None
        head = self.attention.head
        query_weight, key_weight = head.weight.chunk(2)
        query_bias, key_bias = head.bias.chunk(2)
        index = torch.cat([rows.new_zeros(rows.shape[0], 1), rows + 1], dim=1)
        asked = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        query = nn.functional.linear(asked, query_weight, query_bias)
        key = nn.functional.linear(x[:, 1:], key_weight, key_bias)
        query, key = (t.unflatten(-1, (self.attention_heads, -1)).transpose(1, 2) for t in (query, key))
        with torch.autocast(x.device.type, enabled=False):  # products in bfloat16 would round the logits
            return query.float() @ key.float().transpose(-2, -1) * self.attention_scale


class _Norm(nn.LayerNorm):
    """LayerNorm with the eps of the whole student; timm's own default has changed before."""

    def __init__(self, width: int, **_: object) -> None:
        super().__init__(width, eps=EPS)
