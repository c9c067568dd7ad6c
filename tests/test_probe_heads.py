"""The kNN and linear probes against their definitions, against scikit-learn, and on bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tec_cache.errors import ConfigError, NonFiniteError
from tec_cache.probe import knn, linear
from tec_cache.probe.knn import knn_accuracy
from tec_cache.probe.linear import LinearResult, linear_accuracy

Split = tuple[Tensor, Tensor, Tensor, Tensor]
PROBES = [knn_accuracy, linear_accuracy]


@pytest.fixture(scope="module")
def digits() -> Split:
    pixels, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    return pixels[:1200], labels[:1200], pixels[1200:], labels[1200:]


def random_split(num_train: int, num_test: int, dim: int, num_classes: int, seed: int = 0) -> Split:
    """Overlapping Gaussian classes of unequal frequency, in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = num_train + num_test
    frequency = torch.arange(1.0, num_classes + 1)
    labels = torch.multinomial(frequency, rows, replacement=True, generator=generator)
    labels[:num_classes] = torch.arange(num_classes)
    centres = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    features = centres[labels] + 2 * torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return features[:num_train], labels[:num_train], features[num_train:], labels[num_train:]


@contextmanager
def largest_tensor() -> Iterator[list[int]]:
    """Yield a list whose one entry is the largest number of values any new tensor inside had."""
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            for made in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in inputs:
                    largest[0] = max(largest[0], made.numel())
            return result

    with Watch():
        yield largest


# --- kNN ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_with_equal_votes_is_scikit_learns(digits: Split, k: int) -> None:
    train, train_labels, test, test_labels = digits
    reference = KNeighborsClassifier(n_neighbors=k, metric="cosine").fit(train, train_labels)
    expected = reference.score(test.numpy(), test_labels.numpy())
    assert knn_accuracy(*digits, k=k, temperature=None) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_knn_weights_follow_the_equation(temperature: float) -> None:
    train, train_labels, test, test_labels = random_split(300, 200, 8, 5)
    a, b = (f.numpy() / np.linalg.norm(f.numpy(), axis=1, keepdims=True) for f in (train, test))
    predicted = []
    for cosine in b @ a.T:
        votes = np.zeros(5)
        for i in np.argsort(-cosine)[:11]:
            votes[train_labels[i]] += np.exp(cosine[i] / temperature)
        predicted.append(votes.argmax())
    expected = np.mean(np.array(predicted) == test_labels.numpy())
    # Odd sizes: the last chunk of the bank holds fewer rows than k.
    got = knn_accuracy(
        train, train_labels, test, test_labels, k=11, temperature=temperature, batch_size=33, bank_size=59
    )
    assert got == pytest.approx(expected, abs=1e-12)


def test_knn_near_neighbours_outvote_many_far_ones() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, test = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]])
    for temperature in (0.07, 1e-3):  # exp(cosine / 1e-3) is more than float32 holds
        assert knn_accuracy(train, labels, test, torch.tensor([1]), k=3, temperature=temperature) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([0]), k=3, temperature=None) == 1.0


@pytest.mark.parametrize("temperature", [0.07, 1e-4, None])
@pytest.mark.parametrize("order", [[3, 1, 3, 1], [1, 3, 1, 3], [3, 3, 1, 1]])
def test_knn_ties_go_to_the_lower_class(order: list[int], temperature: float | None) -> None:
    train = torch.tensor([[0.3, 0.1]]).expand(4, 2)
    got = knn_accuracy(
        train, torch.tensor(order), torch.tensor([[0.2, 0.9]]), torch.tensor([1]), temperature=temperature
    )
    assert got == 1.0


def test_knn_chunks_find_the_neighbours_of_the_full_matrix() -> None:
    train, train_labels, test, _ = random_split(100, 40, 6, 90)
    cosine = torch.nn.functional.normalize(test) @ torch.nn.functional.normalize(train).T
    near, index = cosine.topk(9)
    for batch_size, bank_size in ((40, 100), (7, 13), (1, 1)):
        got, labels = knn._nearest(train, train_labels, test, 9, batch_size, bank_size)
        torch.testing.assert_close(got, near)
        assert torch.equal(labels, train_labels[index])


def test_knn_with_k_beyond_the_training_rows_lets_all_vote() -> None:
    train, train_labels, test, test_labels = random_split(12, 50, 4, 3)
    split = (train, train_labels, test, test_labels)
    assert knn_accuracy(*split, k=500) == knn_accuracy(*split, k=12)


def test_knn_ignores_the_length_of_features(digits: Split) -> None:
    train, train_labels, test, test_labels = digits
    lengths = torch.linspace(0.01, 100, len(train), dtype=train.dtype)[:, None]
    assert knn_accuracy(train * lengths, train_labels, test, test_labels) == knn_accuracy(*digits)


def test_knn_half_precision_features_are_compared_in_float32() -> None:
    train, train_labels, test, test_labels = random_split(400, 300, 16, 4)
    halves = [(f * 3000).half() for f in (train, test)]  # squares of these overflow float16
    got = knn_accuracy(halves[0], train_labels, halves[1], test_labels)
    assert got == knn_accuracy(halves[0].float(), train_labels, halves[1].float(), test_labels)
    near, _ = knn._nearest(halves[0], train_labels, halves[1], 5, 64, 64)
    assert near.dtype == torch.float32


def test_knn_never_makes_the_full_matrix() -> None:
    split = random_split(1000, 800, 4, 3)  # the full matrix would have 800,000 values
    with largest_tensor() as largest:
        knn_accuracy(*split, k=5, batch_size=20, bank_size=50)
    assert largest[0] <= 800 * 5  # the neighbours kept


# --- linear ------------------------------------------------------------------------------------------


def fit(split: Split, l2: float, dtype: torch.dtype = torch.float64, batch_size: int = 65536) -> linear._Fit:
    scaler = linear._Scaler.measure(split[0], batch_size, dtype)
    classes, targets = split[1].unique(return_inverse=True)
    return linear._minimize(linear._Problem(split[0], targets, len(classes), scaler, l2, batch_size), 200)


def reference_fit(split: Split, l2: float) -> tuple[LogisticRegression, float, float]:
    """Return scikit-learn's fit of the same objective, its value there, and its test accuracy."""
    scaler = StandardScaler().fit(split[0])
    x, y = scaler.transform(split[0]), split[1].numpy()
    model = LogisticRegression(C=1 / (l2 * len(y)), tol=1e-9, max_iter=20000).fit(x, y)
    log_likelihood = model.predict_log_proba(x)[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    objective = -log_likelihood.mean() + l2 / 2 * np.square(model.coef_).sum()
    return model, objective, model.score(scaler.transform(split[2]), split[3].numpy())


@pytest.mark.parametrize("l2", [1e-1, 1e-2, 1e-3, 1e-4])
def test_linear_accuracy_and_objective_are_scikit_learns_on_digits(digits: Split, l2: float) -> None:
    _, objective, accuracy = reference_fit(digits, l2)
    result = linear_accuracy(*digits, l2=l2)
    assert result.converged
    assert result.accuracy == accuracy
    # J - J* <= |gradient|^2 / (2 l2), and 650 components of at most 1e-6 make |gradient|^2 < 7e-10.
    assert objective - 1e-10 <= result.objective <= objective + 3.5e-10 / l2


def test_linear_coefficients_are_scikit_learns() -> None:
    split = random_split(500, 10, 12, 4)  # unequal classes: a penalized bias would show
    model, _, _ = reference_fit(split, 0.1)
    ours = fit(split, 0.1)
    # |W - W*| <= |gradient| / l2 < 7e-6 / 0.1; the largest coefficient is about 0.3.
    np.testing.assert_allclose(ours.weight, model.coef_, atol=7e-5)
    # A shift common to all biases changes no probability.
    bias, intercept = ours.bias - ours.bias.mean(), model.intercept_ - model.intercept_.mean()
    np.testing.assert_allclose(bias, intercept, atol=7e-5)


def test_linear_gradient_is_autograds() -> None:
    features, labels, _, _ = random_split(70, 1, 5, 3)
    scaler = linear._Scaler.measure(features, 70, torch.float64)
    problem = linear._Problem(features, labels, 3, scaler, 0.3, batch_size=16)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    x = (features - features.mean(0)) / features.std(0, correction=0)
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels) + 0.15 * weight.square().sum()
    loss.backward()
    got = problem.evaluate(weight.detach(), bias.detach())
    torch.testing.assert_close(got, (loss.detach(), weight.grad, bias.grad))


@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_linear_float32_products_reach_the_same_optimum(digits: Split, l2: float) -> None:
    single, double = (fit(digits, l2, dtype, 500) for dtype in (torch.float32, torch.float64))
    assert single.converged
    assert single.objective == pytest.approx(double.objective, abs=1e-6)


def test_linear_batches_change_nothing_but_rounding(digits: Split) -> None:
    whole, parts = (linear_accuracy(*digits, l2=1e-2, batch_size=b) for b in (5000, 97))
    assert parts.accuracy == whole.accuracy
    assert parts.objective == pytest.approx(whole.objective, abs=1e-8)


def test_linear_repeats_exactly(digits: Split) -> None:
    assert linear_accuracy(*digits) == linear_accuracy(*digits)


def test_linear_says_when_it_has_not_converged(digits: Split) -> None:
    result = linear_accuracy(*digits, max_iter=3)
    assert not result.converged
    assert result.iterations == 3
    assert result.objective > linear_accuracy(*digits).objective + 0.1


def test_linear_uses_all_its_iterations() -> None:
    # torch's default max_eval is 1.25 max_iter, which a few long line searches use up.
    split = random_split(500, 10, 12, 4)
    result = linear_accuracy(*split, max_iter=4)
    assert (result.iterations, result.converged) == (4, False)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_linear_ignores_a_feature_constant_in_training(value: float) -> None:
    train, train_labels, test, test_labels = random_split(500, 300, 6, 3)
    plain = linear_accuracy(train, train_labels, test, test_labels)
    train = torch.cat([train, torch.full((500, 1), value, dtype=train.dtype)], dim=1)
    test = torch.cat([test, torch.linspace(-1e6, 1e6, 300, dtype=test.dtype)[:, None]], dim=1)
    with_constant = linear_accuracy(train, train_labels, test, test_labels)
    assert with_constant.accuracy == plain.accuracy
    assert with_constant.objective == pytest.approx(plain.objective, abs=1e-10)


def test_linear_standardizes() -> None:
    train, train_labels, test, test_labels = random_split(500, 300, 6, 3)
    plain = linear_accuracy(train, train_labels, test, test_labels)
    scale, shift = torch.logspace(-3, 3, 6).double(), torch.linspace(-50, 50, 6).double()
    moved = linear_accuracy(train * scale + shift, train_labels, test * scale + shift, test_labels)
    assert moved.accuracy == plain.accuracy
    assert moved.objective == pytest.approx(plain.objective, abs=1e-9)


def test_linear_keeps_half_features_half_and_memory_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_CHECK_ROWS", 30)
    train, train_labels, test, test_labels = random_split(1000, 900, 20, 5)
    train, test = (train * 2000).half(), (test * 2000).half()  # sums and squares overflow float16
    with largest_tensor() as largest:
        result = linear_accuracy(train, train_labels, test, test_labels, batch_size=30)
    assert largest[0] <= 1000  # one int64 or bool per row; the features are 20,000 values
    expected = linear_accuracy(train.double(), train_labels, test.double(), test_labels)
    assert result.accuracy == expected.accuracy
    assert result.objective == pytest.approx(expected.objective, abs=1e-8)


def test_linear_fits_only_classes_that_occur() -> None:
    train, train_labels, test, test_labels = random_split(500, 300, 6, 3)
    plain = linear_accuracy(train, train_labels, test, test_labels)
    spread = linear_accuracy(train, train_labels * 7 + 2, test, test_labels * 7 + 2, num_classes=1000)
    assert spread == plain


def test_linear_with_one_class_has_nothing_to_fit() -> None:
    train, test = torch.randn(5, 3), torch.randn(4, 3)
    result = linear_accuracy(train, torch.full((5,), 2), test, torch.tensor([2, 2, 2, 0]))
    assert result == LinearResult(accuracy=0.75, iterations=0, converged=True, objective=0.0)


# --- both --------------------------------------------------------------------------------------------


def accuracy_of(result: float | LinearResult) -> float:
    return result.accuracy if isinstance(result, LinearResult) else result


@pytest.mark.parametrize("probe", PROBES)
def test_a_label_never_trained_on_counts_as_wrong(probe: Any) -> None:
    train, train_labels, test, test_labels = random_split(200, 100, 6, 3)
    before = accuracy_of(probe(train, train_labels, test, test_labels))
    test, test_labels = torch.cat([test, test]), torch.cat([test_labels, torch.full((100,), 99)])
    assert accuracy_of(probe(train, train_labels, test, test_labels)) == before / 2


@pytest.mark.parametrize("probe", PROBES)
def test_the_numbers_of_classes_may_be_as_large_as_64_bits_hold(probe: Any) -> None:
    train, train_labels, test, test_labels = random_split(60, 30, 4, 3)
    numbers = torch.tensor([0, 10**17, 2**63 - 1])
    assert probe(train, numbers[train_labels], test, numbers[test_labels]) == probe(
        train, train_labels, test, test_labels
    )


@pytest.mark.parametrize("probe", PROBES)
def test_labels_may_be_of_any_integer_dtype(probe: Any) -> None:
    train, train_labels, test, test_labels = random_split(200, 100, 6, 3)
    small = probe(train, train_labels.to(torch.uint8), test, test_labels.to(torch.int32))
    assert small == probe(train, train_labels, test, test_labels)


@pytest.mark.parametrize("probe", PROBES)
def test_the_callers_precision_settings_do_not_reach_the_probe(probe: Any) -> None:
    seen: list[tuple[torch.dtype, str]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.append((args[-1].dtype, torch.get_float32_matmul_precision()))
            return func(*args, **(kwargs or {}))

    train, train_labels, test, test_labels = random_split(100, 50, 16, 3)
    torch.set_float32_matmul_precision("medium")
    try:
        with Watch(), torch.autocast("cpu", dtype=torch.bfloat16):
            probe(train.float(), train_labels, test.float(), test_labels)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {(torch.float32 if probe is knn_accuracy else torch.float64, "highest")}


@pytest.mark.parametrize("probe", PROBES)
def test_no_graph_is_recorded_for_features_that_require_gradients(probe: Any) -> None:
    train, train_labels, test, test_labels = random_split(100, 50, 4, 3)
    expected = probe(train, train_labels, test, test_labels)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: _):
        got = probe(train.requires_grad_(), train_labels, test.requires_grad_(), test_labels)
    assert got == expected
    assert not saved


FEATURES, LABELS = torch.eye(4), torch.arange(4)
BAD_INPUTS: list[tuple[dict[str, Any], str]] = [
    ({"train": torch.eye(4)[None]}, r"\[1, 4, 4\]"),
    ({"train": torch.eye(4)[:0], "train_labels": LABELS[:0]}, r"\[0, 4\]"),
    ({"test": torch.eye(4)[:0], "test_labels": LABELS[:0]}, r"\[0, 4\]"),
    ({"test": torch.eye(4, dtype=torch.int64)}, "torch.int64"),
    ({"test": torch.ones(4, 5)}, "4 dimensions, test features 5"),
    ({"test": torch.eye(4, device="meta")}, "on meta"),
    ({"train_labels": LABELS[:3]}, r"shape \[4\], not \[3\]"),
    ({"test_labels": LABELS[:, None]}, r"not \[4, 1\]"),
    ({"test_labels": LABELS.float()}, "torch.float32"),
    ({"test_labels": LABELS > 1}, "torch.bool"),
    ({"train_labels": LABELS - 1}, "label -1 is negative"),
    ({"num_classes": 3}, "label 3 does not fit num_classes=3"),
    ({"num_classes": 0}, "num_classes"),
    ({"batch_size": 0}, "batch_size"),
]


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_bad_input_is_named(probe: Any, change: dict[str, Any], message: str) -> None:
    arguments = {"train": FEATURES, "train_labels": LABELS, "test": FEATURES, "test_labels": LABELS}
    with pytest.raises(ConfigError, match=message) as caught:
        probe(**(arguments | change))
    assert caught.value.where
    assert caught.value.todo


@pytest.mark.parametrize(
    ("probe", "option", "values"),
    [
        (knn_accuracy, "k", [0, 2.5, True]),
        (knn_accuracy, "temperature", [0.0, -1.0, float("nan"), float("inf")]),
        (knn_accuracy, "bank_size", [0]),
        (linear_accuracy, "l2", [-1e-4, float("nan"), float("inf")]),
        (linear_accuracy, "max_iter", [0]),
    ],
)
def test_bad_options_are_named(probe: Any, option: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            probe(FEATURES, LABELS, FEATURES, LABELS, **{option: value})
        assert caught.value.where == option


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["train", "test"])
def test_non_finite_features_are_named(probe: Any, side: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_CHECK_ROWS", 2)  # the bad row lies in the second block
    features = {"train": FEATURES.clone(), "test": FEATURES.clone()}
    features[side][3, 1] = value
    with pytest.raises(NonFiniteError, match=f"{side}, row 3"):
        probe(features["train"], LABELS, features["test"], LABELS)
