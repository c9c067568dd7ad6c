"""Weighted k-nearest-neighbour accuracy of frozen features, and the input checks both probes share.

The vote is that of Wu et al. 2018 (arXiv:1805.01978, section 3.4) as DINO evaluates with it
(Caron et al. 2021, arXiv:2104.14294: k = 20, temperature 0.07): with L2-normalized features f, each
of the k most similar training rows i adds exp(cos(f, f_i) / temperature) to its class, and the class
with the largest sum wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from tec_cache.errors import ConfigError, NonFiniteError
from tec_cache.printable import counted

# Rows per block of the finiteness check: a bool for every value of 1.28 million x 768 at once is 1 GB.
_CHECK_ROWS = 65536


@torch.no_grad()
def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    num_classes: int | None = None,
    batch_size: int = 1024,
    bank_size: int = 65536,
) -> float:
    """Return the fraction of test rows, 0 to 1, whose k nearest training rows vote for their label.

    Args:
        train: [num_train, dim], any floating dtype; the device it is on does the work.
        train_labels: [num_train], any integer dtype and device, values >= 0.
        test: [num_test, dim], any floating dtype, on the device of `train`.
        test_labels: [num_test]; a label that no training row has counts as wrong.
        k: neighbours that vote; with fewer than k training rows, all of them vote.
        temperature: of the weights exp(cosine / temperature); None gives every neighbour one vote.
        num_classes: if given, labels outside 0 .. num_classes - 1 are refused; the result is the same.
        batch_size: test rows compared at once.
        bank_size: training rows compared at once.

    Similarities are float32 (float64 if either input is), never half precision or TF32. Equal sums of
    votes go to the lower class number. Among equally similar rows at the k-th place, which one votes is
    left to `torch.topk`. A row of zeros has cosine 0 with everything.

    Memory beside the inputs is batch_size x bank_size similarities (0.27 GB at the defaults),
    bank_size x dim normalized rows and num_test x k neighbours.

    Raises:
        ConfigError: shapes, dtypes, devices, labels or options that do not fit.
        NonFiniteError: a NaN or an infinity in the features.
    """
    check_positive(k=k, batch_size=batch_size, bank_size=bank_size)
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(
            f"the kNN temperature must be a positive number, not {temperature}",
            where="temperature",
            todo="use 0.07 as DINO does, or None for one vote per neighbour",
        )
    check_inputs(train, train_labels, test, test_labels, num_classes)
    train_labels, test_labels = (t.to(train.device, torch.int64) for t in (train_labels, test_labels))
    # only a class of the training set can be voted for: the ballot lists those, however large their numbers are
    classes, train_labels = train_labels.unique(return_inverse=True)

    with full_precision(train.device):
        similarity, voters = _nearest(train, train_labels, test, min(k, len(train)), batch_size, bank_size)
    correct = 0
    for start in range(0, len(test), batch_size):
        rows = slice(start, start + batch_size)
        predicted = classes[_vote(similarity[rows], voters[rows], temperature, len(classes))]
        correct += int((predicted == test_labels[rows]).sum())
    return correct / len(test)


def _nearest(
    train: Tensor, train_labels: Tensor, test: Tensor, k: int, batch_size: int, bank_size: int
) -> tuple[Tensor, Tensor]:
    """Return the cosines (descending) and the labels of each test row's k nearest: two [num_test, k]."""
    dtype = torch.promote_types(torch.promote_types(train.dtype, test.dtype), torch.float32)
    similarity = torch.full((len(test), k), -math.inf, dtype=dtype, device=train.device)
    labels = torch.zeros((len(test), k), dtype=torch.int64, device=train.device)
    # The bank is the outer loop because it is the larger side: each of its rows is normalized only once.
    for bank_start in range(0, len(train), bank_size):
        bank = F.normalize(train[bank_start : bank_start + bank_size].to(dtype), dim=1)
        bank_labels = train_labels[bank_start : bank_start + bank_size]
        for start in range(0, len(test), batch_size):
            rows = slice(start, start + batch_size)
            cosine = F.normalize(test[rows].to(dtype), dim=1) @ bank.T
            near, index = cosine.topk(min(k, len(bank)), dim=1)
            # The best so far and the best of this chunk hold the best of both.
            similarity[rows], kept = torch.cat([similarity[rows], near], dim=1).topk(k, dim=1)
            labels[rows] = torch.cat([labels[rows], bank_labels[index]], dim=1).gather(1, kept)
    return similarity, labels


def _vote(similarity: Tensor, labels: Tensor, temperature: float | None, num_classes: int) -> Tensor:
    """Return the class [rows] that the neighbours ([rows, k] cosines, descending, and labels) elect."""
    if temperature is None:
        weights = torch.ones_like(similarity)
    else:
        # Relative to the nearest neighbour: the same winner, and exp cannot overflow at a small
        # temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = torch.zeros((len(labels), num_classes), dtype=weights.dtype, device=weights.device)
    # One neighbour at a time: a single scatter_add_ on a GPU adds a row's votes in any order, and two
    # classes with the same votes would then differ in the last bit.
    for neighbour in range(labels.shape[1]):
        column = slice(neighbour, neighbour + 1)
        votes.scatter_add_(1, labels[:, column], weights[:, column])
    return votes.argmax(dim=1)  # documented to take the first of equal maxima: the lower class number


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply matrices in the dtype they have, whatever the caller's autocast and TF32 settings.

    A training run has usually set both; TF32's 10-bit mantissa would reorder close neighbours and stall
    the line search of `linear`.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_positive(**options: int) -> None:
    """Raise ConfigError for the first option that is not an integer of at least 1."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{name} must be a whole number of at least 1, not {value!r}",
                where=name,
                todo="pass 1 or more",
            )


def check_inputs(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int | None
) -> None:
    """Check what both probes ask of features [rows, dim] and integer labels [rows].

    Raises:
        ConfigError: shapes, dtypes, devices or labels that do not fit.
        NonFiniteError: a NaN or an infinity in the features.
    """
    if num_classes is not None:
        check_positive(num_classes=num_classes)
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        _check_features(name, features)
        _check_labels(f"{name}_labels", labels, len(features), num_classes)
    if train.shape[1] != test.shape[1]:
        raise ConfigError(
            f"training features have {train.shape[1]} dimensions, test features {test.shape[1]}",
            where="train, test",
            todo="extract both with the same model and the same pooling",
        )
    if train.device != test.device:
        raise ConfigError(
            f"training features are on {train.device}, test features on {test.device}",
            where="train, test",
            todo="move both to the device that shall do the work",
        )
    for name, features in (("train", train), ("test", test)):
        _check_finite(name, features)


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or 0 in features.shape:
        raise ConfigError(
            f"features must be [rows, dim] with at least one of each, not {list(features.shape)}",
            where=name,
            todo="pool each image to one vector and stack them",
        )
    if not features.is_floating_point():
        raise ConfigError(
            f"features must be floating point, not {features.dtype}", where=name, todo="call .float() on them"
        )


def _check_labels(name: str, labels: Tensor, num_rows: int, num_classes: int | None) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ConfigError(f"labels must be integers, not {labels.dtype}", where=name, todo="pass class numbers from 0")
    if labels.shape != (num_rows,):
        raise ConfigError(
            f"{counted(num_rows, 'feature row')}: labels must have shape [{num_rows}], not {list(labels.shape)}",
            where=name,
            todo="pass one class number per feature row, in the same order",
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise ConfigError(
            f"label {lowest} is negative", where=name, todo="drop unlabelled rows and number classes from 0"
        )
    if num_classes is not None and highest >= num_classes:
        raise ConfigError(
            f"label {highest} does not fit num_classes={num_classes}",
            where=name,
            todo=f"number classes 0 .. {num_classes - 1}, or leave num_classes out",
        )


def _check_finite(name: str, features: Tensor) -> None:
    for start in range(0, len(features), _CHECK_ROWS):
        finite = features[start : start + _CHECK_ROWS].isfinite().all(dim=1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise NonFiniteError(
                "a feature is NaN or infinite",
                where=f"{name}, row {row}",
                todo="look at that image's features; float16 overflows above 65504, so try float32",
            )
