"""The pure functions between a base and a student, against numpy, torch's own operations and plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tec_cache.errors import ConfigError
from tec_cache.targets import (
    attention_rows,
    narrow_rows,
    normalize_features,
    normalize_targets,
    pixel_targets,
    select_rows,
    target_distribution,
)
from tec_cache.types import Targets


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("how", "axis"), [("patch", 1), ("feature", 2)])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_normalization_is_that_of_numpy(how: Any, axis: int, scale: float) -> None:
    # at a scale of 1e-3 the variance is as small as eps, so eps and its place inside the root are seen
    x = noise(3, 16, 6) * scale + 2
    exact = x.double().numpy()
    mean, var = exact.mean(axis, keepdims=True), exact.var(axis, keepdims=True, ddof=1)
    expected = (exact - mean) / np.sqrt(var + 1e-6)
    np.testing.assert_allclose(normalize_features(x, how).numpy(), expected, rtol=0, atol=3e-4)
    biased = (exact - mean) / np.sqrt(exact.var(axis, keepdims=True) + 1e-6)
    assert np.abs(biased - expected).max() > 1e-3  # else the tolerance would hide the wrong variance


@pytest.mark.parametrize("how", ["patch", "feature", "none"])
def test_normalization_is_in_float32_whatever_comes_in(how: Any) -> None:
    x = noise(2, 9, 4).to(torch.float16)
    out = normalize_features(x, how)
    assert out.dtype == torch.float32
    assert torch.equal(out, normalize_features(x.float(), how))


def test_no_normalization_changes_nothing() -> None:
    x = noise(2, 9, 4)
    assert torch.equal(normalize_features(x, "none"), x)


def test_patch_normalization_forgets_each_views_and_channels_offset_and_scale() -> None:
    x = noise(2, 16, 5)
    other = x * torch.tensor([2.0, 7.0])[:, None, None] + noise(2, 1, 5, seed=1)
    torch.testing.assert_close(normalize_features(x, "patch"), normalize_features(other, "patch"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [4, 49, 196])
def test_patch_normalization_keeps_its_bound_and_one_outlier_reaches_it(num_tokens: int) -> None:
    x = noise(2, num_tokens, 3)
    x[0, 1] = 1e4
    x[1, 2, 0] = -1e4
    bound = (num_tokens - 1) / math.sqrt(num_tokens)
    largest = normalize_features(x, "patch").abs().max().item()
    assert largest <= bound * (1 + 1e-6)
    alone = torch.zeros(1, num_tokens, 1)
    alone[0, 0] = 1e4
    assert normalize_features(alone, "patch").max().item() == pytest.approx(bound, rel=1e-5)


def test_equal_patches_give_zeros_not_nan() -> None:
    assert torch.equal(normalize_features(torch.full((1, 9, 2), 3.0), "patch"), torch.zeros(1, 9, 2))


@pytest.mark.parametrize(("how", "shape"), [("patch", (2, 1, 5)), ("feature", (2, 5, 1))])
def test_one_value_has_no_variance(how: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="no variance"):
        normalize_features(noise(*shape), how)


def test_unknown_normalization_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'layer'.*\n.*patch, feature, none"):
        normalize_features(noise(1, 4, 4), "layer")  # type: ignore[arg-type]


def test_targets_are_normalized_in_their_features_only() -> None:
    raw = Targets(noise(2, 9, 4), noise(2, 3, 4, 9, seed=1), torch.tensor([[0, 1, 2]] * 2))
    made = normalize_targets(raw, "patch")
    assert torch.equal(made.features, normalize_features(raw.features, "patch"))
    assert made.attention is raw.attention
    assert made.rows is raw.rows


def test_rows_are_the_highest_scores_in_descending_order() -> None:
    scores = noise(5, 49)
    assert torch.equal(select_rows(scores, 7), scores.topk(7, dim=1, sorted=True).indices)


def test_a_tie_goes_to_the_lower_patch_number() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert select_rows(scores, 5).tolist() == [[1, 3, 5, 2, 4], [0, 1, 2, 3, 4]]
    # many patches and few values, where an unstable sort shows: numpy's stable sort decides
    many = torch.randint(0, 3, (4, 196), generator=torch.Generator().manual_seed(3)).float()
    expected = np.argsort(-many.numpy(), axis=1, kind="stable")
    assert np.array_equal(select_rows(many, 196).numpy(), expected)


@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_a_smaller_k_is_a_prefix(k: int) -> None:
    scores = noise(3, 9).round()
    rows = select_rows(scores, k)
    assert rows.shape == (3, k)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, select_rows(scores, 9)[:, :k])


def test_all_rows_are_in_patch_order() -> None:
    assert select_rows(noise(2, 4), "all").tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("k", [-1, 10, None])
def test_rows_that_are_not_there_are_refused(k: Any) -> None:
    with pytest.raises(ConfigError, match="9 patches"):
        select_rows(noise(2, 9), k)


def loops(
    query: Tensor, key: Tensor, bias: Tensor | None, prefix: int, class_token: bool, k: Any
) -> tuple[Tensor, Tensor]:
    """The rows by the definition: the whole matrix of logits in float64, then picked one by one."""
    full = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double()) / math.sqrt(query.shape[-1])
    if bias is not None:
        full = full + bias.double()
    full = full[..., prefix:]
    batch, _, _, num_tokens = full.shape
    logits, rows = [], []
    for b in range(batch):
        first = full[b, :, 0] if class_token else full[b, :, prefix:].mean(1)
        score = first.mean(0).tolist()
        order = sorted(range(num_tokens), key=lambda i: (-score[i], i))
        chosen = list(range(num_tokens)) if k == "all" else order[:k]
        rows.append(torch.tensor(chosen, dtype=torch.int64))
        logits.append(torch.stack([first, *(full[b, :, prefix + i] for i in chosen)], dim=1))
    return torch.stack(logits), torch.stack(rows)


@pytest.mark.parametrize("k", [0, 4, "all"])
@pytest.mark.parametrize(("prefix", "class_token"), [(1, True), (5, True), (0, False), (4, False)])
@pytest.mark.parametrize("bias_shape", [None, (1, 3, -1, -1), (3, -1, -1), (2, 3, -1, -1), (1, 1, 1, -1)])
def test_attention_rows_by_the_definition(k: Any, prefix: int, class_token: bool, bias_shape: Any) -> None:
    tokens = prefix + 9
    query, key = noise(2, 3, tokens, 8), noise(2, 3, tokens, 8, seed=1)
    bias = None if bias_shape is None else noise(*(tokens if n == -1 else n for n in bias_shape), seed=2)
    logits, rows = attention_rows(
        query, key, scale=8**-0.5, num_prefix=prefix, has_class_token=class_token, k=k, bias=bias
    )
    expected, expected_rows = loops(query, key, bias, prefix, class_token, k)
    assert torch.equal(rows, expected_rows)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.float(), rtol=0, atol=1e-5)


def test_attention_rows_of_half_precision_are_multiplied_in_float32() -> None:
    query, key = noise(2, 3, 10, 8).bfloat16(), noise(2, 3, 10, 8, seed=1).bfloat16()
    expected, expected_rows = loops(query, key, None, 1, True, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, rows = attention_rows(query, key, scale=8**-0.5, num_prefix=1, has_class_token=True, k=4)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.float(), rtol=0, atol=1e-5)
    assert torch.equal(rows, expected_rows)


def stored(k: int = 5) -> Targets:
    return Targets(noise(2, 9, 4), noise(2, 3, k + 1, 9, seed=1), select_rows(noise(2, 9, seed=2), k))


@pytest.mark.parametrize("k", [0, 1, 4, 5])
def test_fewer_rows_are_what_a_smaller_k_gives(k: int) -> None:
    query, key = noise(2, 3, 10, 8), noise(2, 3, 10, 8, seed=1)
    settings: dict[str, Any] = {"scale": 1.0, "num_prefix": 1, "has_class_token": True}
    many = attention_rows(query, key, k=5, **settings)
    few = attention_rows(query, key, k=k, **settings)
    narrowed = narrow_rows(Targets(noise(2, 9, 4), *many), k)
    assert torch.equal(narrowed.features, noise(2, 9, 4))
    assert narrowed.attention is not None
    assert narrowed.rows is not None
    torch.testing.assert_close(narrowed.attention, few[0])
    assert torch.equal(narrowed.rows, few[1])


def test_narrowing_to_none_drops_the_attention() -> None:
    narrowed = narrow_rows(stored(), None)
    assert narrowed.attention is None
    assert narrowed.rows is None
    assert torch.equal(narrowed.features, stored().features)


def test_narrowing_all_rows_to_all_keeps_them() -> None:
    targets = stored(9)
    narrowed = narrow_rows(targets, "all")
    assert narrowed.attention is not None
    assert torch.equal(narrowed.attention, targets.attention)
    assert torch.equal(narrowed.rows, targets.rows)


@pytest.mark.parametrize("k", [6, 9, "all"])
def test_more_rows_than_are_stored_are_refused(k: Any) -> None:
    with pytest.raises(ConfigError, match=f"k = {k} was asked for, 5 rows are stored"):
        narrow_rows(stored(), k)


@pytest.mark.parametrize("k", [0, 3, "all"])
def test_rows_of_targets_without_attention_are_refused(k: Any) -> None:
    with pytest.raises(ConfigError, match="no attention rows"):
        narrow_rows(Targets(noise(2, 9, 4)), k)


@pytest.mark.parametrize(("grid", "size"), [(2, 8), (4, 32), (7, 98)])
def test_pixel_targets_are_those_of_a_masked_autoencoder(grid: int, size: int) -> None:
    pixels = noise(2, 3, size, size)
    p = size // grid
    # patches row by row; inside a patch pixels row by row, the three colours of a pixel side by side
    split = np.einsum("bcyixj->byxijc", pixels.double().numpy().reshape(2, 3, grid, p, grid, p))
    patches = split.reshape(2, grid * grid, p * p * 3)
    mean, var = patches.mean(-1, keepdims=True), patches.var(-1, keepdims=True, ddof=1)
    made = pixel_targets(pixels, grid)
    np.testing.assert_allclose(made.features.numpy(), (patches - mean) / np.sqrt(var + 1e-6), rtol=0, atol=1e-5)
    assert made.attention is None
    assert made.rows is None


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.8])
def test_target_distribution_is_the_softmax_of_the_logits_over_tau(tau: float) -> None:
    logits = (noise(2, 3, 4, 9) * 3).half()
    exact = np.exp(logits.double().numpy() / tau)
    expected = exact / exact.sum(-1, keepdims=True)
    made = target_distribution(logits, tau)
    assert made.dtype == torch.float32
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(made, F.softmax(logits.float() / tau, dim=-1))


def test_target_distribution_does_not_see_what_a_cache_leaves_out() -> None:
    logits = noise(2, 3, 4, 9)
    shifted = logits + noise(2, 3, 4, 1, seed=1)
    torch.testing.assert_close(target_distribution(logits, 1.8), target_distribution(shifted, 1.8))


def test_targets_move_with_everything_they_hold() -> None:
    moved = stored().to("meta")
    assert moved.features.device.type == "meta"
    assert moved.attention is not None
    assert moved.attention.device.type == "meta"
    assert moved.rows is not None
    assert moved.rows.device.type == "meta"
    bare = Targets(noise(1, 4, 2)).to("meta")
    assert bare.attention is None
    assert bare.rows is None
