"""How far two targets of the same views agree where they may have chosen other attention rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tec_cache.types import Targets


def cosine_of_views(first: Targets, second: Targets) -> torch.Tensor:
    """Return the cosine between the features (B, L, C) of each view, all tokens as one vector: (B,) float64."""
    return F.cosine_similarity(first.features.double().flatten(1), second.features.double().flatten(1), dim=1).cpu()


def attention_agreement(first: Targets, second: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the attention rows that both chose; return KL (B,) and the share of rows chosen alike (B,), float64.

    KL: divergence of `second` from `first` in nats at temperature 1, mean over heads, over row 0 and over the rows
    of patches that are in both, whatever their order. The share counts rows of patches alone; 1 where there are none.
    """
    assert first.attention is not None
    assert second.attention is not None
    assert first.rows is not None
    assert second.rows is not None
    p, q = (x.attention.float().log_softmax(-1) for x in (first, second))  # type: ignore[union-attr]
    same = first.rows[:, :, None] == second.rows[:, None, :]
    place = F.pad(same.int().argmax(-1) + 1, (1, 0))  # of each row of `first` among those of `second`; row 0 is row 0
    counts = F.pad(same.any(-1), (1, 0), value=True).double()
    q = q.gather(2, place[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    rows = (p.exp() * (p - q)).sum(-1).double().mean(1)
    kl = (rows * counts).sum(1) / counts.sum(1)
    alike = counts[:, 1:].mean(1) if first.rows.shape[1] else torch.ones_like(kl)
    return kl.cpu(), alike.cpu()
