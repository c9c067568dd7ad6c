"""Codecs: what comes back, in which error, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tec_cache.codec import get_codec
from tec_cache.codec.errors import TargetErrors
from tec_cache.codec.quality import LIMITS, Quality, qualities
from tec_cache.errors import CacheError, ConfigError, NonFiniteError
from tec_cache.targets import normalize_targets
from tec_cache.types import Targets, TargetSpec

EXACT = Quality.parse("exact").to_json(512)


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


def there_and_back(s: TargetSpec, t: Targets) -> Targets:
    codec = get_codec(EXACT, None)
    arrays = codec.encode(t, s)
    declared = codec.arrays(s)
    assert {n: (a.shape[1:], a.dtype.name) for n, a in arrays.items()} == {
        n: (d.shape, d.dtype) for n, d in declared.items()
    }
    tensors = {n: torch.from_numpy(a.astype(np.int32) if a.dtype == np.uint16 else a) for n, a in arrays.items()}
    return get_codec(EXACT, codec.to_bytes()).decode(tensors, s)


@pytest.mark.parametrize("k", [None, 0, 5, 16, "all"])
def test_exact_is_half_precision(k: Any) -> None:
    s = spec(k)
    t = targets(s)
    back = there_and_back(s, t)
    assert ((back.features - t.features).abs() <= 2**-11 * t.features.abs() * 1.001 + 1e-7).all()
    if k is None:
        assert back.attention is None
        return
    assert back.attention is not None
    assert t.attention is not None
    assert torch.equal(back.rows, t.rows)
    p, q = t.attention.softmax(-1), back.attention.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    assert 0 <= kl < 1e-6


def test_a_large_common_offset_of_the_logits_costs_nothing() -> None:
    """The softmax does not see it, so half precision need not hold it: 40,000 + noise would lose the noise."""
    s = spec(5)
    t = targets(s)
    assert t.attention is not None
    far = Targets(t.features, t.attention + 40_000, t.rows)
    near, back = there_and_back(s, t).attention, there_and_back(s, far).attention
    assert near is not None
    assert back is not None
    assert (near - back).abs().max() < 0.02  # float32 at 40,000 is 0.004 apart, half precision 32


@pytest.mark.parametrize("value", [70_000.0, float("nan"), float("inf")])
def test_what_half_precision_cannot_hold_is_an_error(value: float) -> None:
    s = spec(5)
    t = targets(s)
    codec = get_codec(EXACT, None)
    spoiled = t.features.clone()
    spoiled[1, 2, 3] = value
    with pytest.raises(NonFiniteError, match=r"features .*half precision"):
        codec.encode(Targets(spoiled, t.attention, t.rows), s)
    assert t.attention is not None
    spoiled = t.attention.clone()
    # one logit stays that far from its row's mean
    spoiled[1, 2, 3, 4] = value * 2
    with pytest.raises(NonFiniteError, match=r"attention logits .*half precision"):
        codec.encode(Targets(t.features, spoiled, t.rows), s)


def test_zeros_come_back_as_zeros() -> None:
    assert there_and_back(spec(None), Targets(torch.zeros(2, 16, 24))).features.abs().max() == 0


# ---- the quality that is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mse", "kl"),
    [("exact", None, None), ("high", 0.02, 0.01), ("default", 0.04, 0.03), ("small", 0.10, 0.08),
     ("0.05,0.04", 0.05, 0.04), ("5e-2, 0.04", 0.05, 0.04), ("0.003,0.001", 0.003, 0.001), ("0.3,0.2", 0.3, 0.2)],
)  # fmt: skip
def test_quality_is_a_name_or_two_errors(text: str, mse: float | None, kl: float | None) -> None:
    quality = Quality.parse(text)
    assert (quality.mse, quality.kl, quality.fitted) == (mse, kl, mse is not None)
    stored = quality.to_json(512)
    assert Quality.from_json(stored) == quality
    assert stored["name"] == ("exact" if mse is None else "transform")
    assert ("fit_views" in stored) == (mse is not None)
    assert Quality.parse(str(quality)) == quality
    assert (str(quality) == text) == (text in (*qualities(), "0.05,0.04", "0.003,0.001", "0.3,0.2"))


def test_numbers_of_a_name_are_that_name() -> None:
    """Asking for default, and asking for its numbers, is the same target set."""
    assert Quality.parse("0.04,0.03").to_json(512) == Quality.parse("default").to_json(512)
    assert str(Quality.parse("0.04,0.03")) == "default"


@pytest.mark.parametrize("text", ["", "defualt", "0.05", "0.05,0.04,0.03", "0.05;0.04", ",", "a,b", "0.05,", "EXACT"])
def test_anything_else_is_refused_with_the_choices(text: str) -> None:
    with pytest.raises(ConfigError, match="--quality") as error:
        Quality.parse(text)
    assert all(name in error.value.todo for name in qualities())
    assert error.value.exit_code == 2
    if text == "defualt":
        assert "did you mean default" in error.value.what


@pytest.mark.parametrize(
    ("text", "name"),
    [("0.0029,0.01", "mse"), ("0.31,0.01", "mse"), ("0.05,0.0009", "kl"), ("0.05,0.21", "kl"), ("nan,0.03", "mse"),
     ("0.04,inf", "kl"), ("-0.04,0.03", "mse"), ("0,0", "mse"), ("0.04,nan", "kl")],
)  # fmt: skip
def test_errors_that_no_codec_can_keep_are_refused(text: str, name: str) -> None:
    low, high = LIMITS[name]
    with pytest.raises(ConfigError, match=name) as error:
        Quality.parse(text)
    assert f"give {name} from {low} to {high}" in error.value.todo


@pytest.mark.parametrize(
    "stored", [{"name": "int8"}, {"name": ""}, {"name": "transform", "mse": 0.04, "kl": 0.03, "fit_views": 8}]
)
def test_an_unknown_codec_or_one_without_its_parameters_is_refused(stored: dict[str, Any]) -> None:
    with pytest.raises(CacheError, match="unknown codec"):
        get_codec(stored, None)


@pytest.mark.parametrize("parameters", [b"", b"rubbish", bytes(100), b'{"a": 1}', b"\x02" + bytes(7) + b"{}"])
def test_parameters_that_are_none_are_refused(parameters: bytes) -> None:
    with pytest.raises(CacheError, match="parameters are damaged"):
        get_codec(Quality.parse("default").to_json(512), parameters)


# ---- the error that is measured ------------------------------------------------------------------------------


def test_measured_errors_are_what_they_are_called() -> None:
    """Against the definitions, written out here: squared error over energy about the channels' means, and KL."""
    s, g = spec(2), torch.Generator().manual_seed(1)
    exact = targets(s, 5)
    exact = Targets(exact.features * 2 + 3, exact.attention, exact.rows)
    assert exact.attention is not None
    far = Targets(
        exact.features + 0.3 * torch.randn(exact.features.shape, generator=g),
        exact.attention + 0.2 * torch.randn(exact.attention.shape, generator=g) + 7,
        exact.rows,
    )
    errors = TargetErrors()
    for part in (slice(0, 2), slice(2, 5)):
        pair = (Targets(t.features[part], t.attention[part], t.rows[part]) for t in (exact, far))  # type: ignore[index]
        errors.add(*pair)
    x, y = exact.features.double(), far.features.double()
    energy = (x - x.mean((0, 1))).square().sum()
    assert far.attention is not None
    p, q = exact.attention.double().softmax(-1), far.attention.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    found = errors.summary()
    assert found["mse"] == pytest.approx(float((x - y).square().sum() / energy), rel=1e-4)
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    per_view = (x - y).square().sum((1, 2)) / energy * 5
    assert found["mse_max"] == pytest.approx(float(per_view.max()), rel=1e-4)
    assert found["kl_max"] == pytest.approx(float(kl.mean((1, 2)).max()), rel=1e-4)
    assert found["mse_std"] == pytest.approx(float(per_view.std()), rel=1e-4)
    assert len(errors.mse_of_views) == 5
