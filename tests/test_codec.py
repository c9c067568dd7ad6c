"""Codecs: what comes back, in which error, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tec_cache.codec import CODECS, get_codec
from tec_cache.errors import ConfigError, NonFiniteError
from tec_cache.targets import normalize_targets
from tec_cache.types import Targets, TargetSpec


def spec(k: Any) -> TargetSpec:
    return TargetSpec(grid=4, channels=24, num_heads=0 if k is None else 3, k=k, normalization="patch")


def targets(s: TargetSpec, batch: int = 3) -> Targets:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(batch, s.num_tokens, s.channels, generator=g) * 3 + 1
    if s.k is None:
        return normalize_targets(Targets(features), "patch")
    logits = torch.randn(batch, s.num_heads, s.num_rows, s.num_tokens, generator=g) * 4 + 100
    if s.k == "all":
        rows = torch.arange(s.num_tokens).expand(batch, -1)
    else:
        rows = torch.stack([torch.randperm(s.num_tokens, generator=g)[: s.num_rows - 1] for _ in range(batch)])
    return normalize_targets(Targets(features, logits, rows), "patch")


def there_and_back(name: str, s: TargetSpec, t: Targets) -> Targets:
    codec = get_codec(name)
    arrays = codec.encode(t, s)
    declared = codec.arrays(s)
    assert {n: (a.shape[1:], a.dtype.name) for n, a in arrays.items()} == {n: tuple(d) for n, d in declared.items()}
    tensors = {n: torch.from_numpy(a.astype(np.int32) if a.dtype == np.uint16 else a) for n, a in arrays.items()}
    return get_codec(codec.to_json()).decode(tensors, s)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("k", [None, 0, 5, 16, "all"])
def test_round_trip(name: str, k: Any) -> None:
    s = spec(k)
    t = targets(s)
    back = there_and_back(name, s, t)
    step = 2**-11 * t.features.abs() if name == "fp16" else t.features.abs().amax(1, keepdim=True) / 127 / 2
    assert ((back.features - t.features).abs() <= step * 1.001 + 1e-7).all()
    if k is None:
        assert back.attention is None
        return
    assert back.attention is not None
    assert t.attention is not None
    assert torch.equal(back.rows, t.rows)
    p, q = t.attention.softmax(-1), back.attention.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    assert 0 <= kl < (1e-6 if name == "fp16" else 1e-3)


@pytest.mark.parametrize("name", CODECS)
def test_a_large_common_offset_of_the_logits_costs_nothing(name: str) -> None:
    """The softmax does not see it, so half precision need not hold it: 40,000 + noise would lose the noise."""
    s = spec(5)
    t = targets(s)
    assert t.attention is not None
    far = Targets(t.features, t.attention + 40_000, t.rows)
    near, back = there_and_back(name, s, t).attention, there_and_back(name, s, far).attention
    assert near is not None
    assert back is not None
    assert (near - back).abs().max() < 0.15  # an int8 step is 0.09; half precision at 40,000 is 16 apart


def test_overflow_is_an_error() -> None:
    t = Targets(torch.full((1, 16, 24), 70_000.0))
    with pytest.raises(NonFiniteError, match="half precision"):
        get_codec("fp16").encode(t, spec(None))
    with pytest.raises(NonFiniteError):
        get_codec("int8").encode(Targets(torch.full((1, 16, 24), float("nan"))), spec(None))


def test_a_constant_channel_decodes_to_itself() -> None:
    s = spec(None)
    assert there_and_back("int8", s, Targets(torch.zeros(2, 16, 24))).features.abs().max() == 0


def test_unknown_codec_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean fp16"):
        get_codec("fp61")
