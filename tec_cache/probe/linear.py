"""Linear-probe accuracy of frozen features: multinomial logistic regression, fitted to convergence.

The objective is scikit-learn's `LogisticRegression(C=1 / (l2 * num_train))` for three or more classes:

    J(W, b) = mean_i cross_entropy(W x_i + b, y_i) + l2 / 2 * ||W||^2        (1)

over features x standardized with the training mean and deviation; the bias b is not penalized. It is
strictly convex in W for l2 > 0, so the answer does not hang on a learning rate, a schedule or a seed.

Precision: on a GPU the products over the training rows are float32 (float64 runs there at a small
fraction of that rate on most cards), on a CPU float64, where it costs a factor of two and makes the
answer reproducible to many digits. The parameters, the sums over batches and the L-BFGS history
are float64 on both: close to the optimum a line search compares objectives that differ by less than
one float32 rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tec_cache.errors import ConfigError, NonFiniteError
from tec_cache.probe.knn import check_inputs, check_positive, full_precision

# L-BFGS stops when no component of the gradient of (1) is larger than this. scikit-learn's default is 1e-4;
# on digits at l2 = 1e-4 a stop at 1e-5 still left 2 of 597 predictions unlike those of the optimum.
_GRADIENT_TOLERANCE = 1e-6
# Converged is what the products' precision can promise: on digits float32 stalls between 1e-6 and 3e-6.
_CONVERGED_BELOW = {torch.float32: 1e-5, torch.float64: 1e-6}
# L-BFGS gives up when an iteration changes the objective, or every parameter, by less than this.
_CHANGE_TOLERANCE = 1e-13
_HISTORY = 10
# A feature that deviates less than this part of its own mean, or of the most variable feature's
# deviation, is taken as constant: what is left of it is rounding, which dividing would blow up.
_CONSTANT_BELOW = 1e-6


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """What a linear probe found."""

    accuracy: float
    """Fraction of test rows classified correctly, 0 to 1."""
    iterations: int
    """L-BFGS iterations taken."""
    converged: bool
    """Whether every component of the final gradient is at most 1e-6 (1e-5 with float32 products).

    If not, raise `max_iter` or `l2`."""
    objective: float
    """Final value of the objective (1), in nats."""


@torch.no_grad()
def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    l2: float = 1e-4,
    max_iter: int = 200,
    batch_size: int = 65536,
    num_classes: int | None = None,
) -> LinearResult:
    """Fit equation (1) on the training rows by full-batch L-BFGS from zero, and score the test rows.

    Args:
        train: [num_train, dim], any floating dtype; the device it is on does the work. The tensor keeps
            its dtype: rows are converted and standardized one batch at a time.
        train_labels: [num_train], any integer dtype and device, values >= 0.
        test: [num_test, dim], any floating dtype, on the device of `train`.
        test_labels: [num_test]; a label that no training row has counts as wrong.
        l2: weight of the penalty, >= 0. At 0, separable classes have no optimum.
        max_iter: L-BFGS iterations at most; each is little more than one pass over the training rows.
        batch_size: rows whose logits exist at once; changes the result by rounding only.
        num_classes: if given, labels outside 0 .. num_classes - 1 are refused; the result is the same.

    Memory beside the inputs is a few times batch_size x (dim + classes) and 25 float64 copies of the
    parameters. A feature that is constant in training is ignored.

    Raises:
        ConfigError: shapes, dtypes, devices, labels or options that do not fit.
        NonFiniteError: a NaN or an infinity in the features, or an objective that overflows.
    """
    check_positive(max_iter=max_iter, batch_size=batch_size)
    if not (math.isfinite(l2) and l2 >= 0):
        raise ConfigError(
            f"the l2 penalty must be a number of at least 0, not {l2}", where="l2", todo="start from 1e-4"
        )
    check_inputs(train, train_labels, test, test_labels, num_classes)
    # L-BFGS evaluates with gradients enabled: features that ask for one would record every pass.
    train, test = train.detach(), test.detach()
    dtype = torch.promote_types(train.dtype, torch.float64 if train.device.type == "cpu" else torch.float32)
    with full_precision(train.device):
        # Only classes that occur are fitted. One that does not has its optimum at a bias of minus
        # infinity: it is never predicted, and L-BFGS would chase it without converging.
        classes, targets = train_labels.to(train.device, torch.int64).unique(return_inverse=True)
        scaler = _Scaler.measure(train, batch_size, dtype)
        problem = _Problem(train, targets, len(classes), scaler, l2, batch_size)
        fit = _minimize(problem, max_iter)
        test_labels = test_labels.to(train.device, torch.int64)
        correct = _count_correct(fit, scaler, classes, test, test_labels, batch_size)
    return LinearResult(
        accuracy=correct / len(test),
        iterations=fit.iterations,
        converged=fit.converged,
        objective=fit.objective,
    )


@dataclass(frozen=True)
class _Scaler:
    """x -> (x - mean) * scale for features [rows, dim]; mean and scale [dim] have the working dtype."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def measure(cls, features: Tensor, batch_size: int, dtype: torch.dtype) -> _Scaler:
        """Measure mean and population deviation in two passes, in float64: float16 would overflow."""
        total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
        for batch in features.split(batch_size):
            total += batch.sum(0, dtype=torch.float64)
        mean = total / len(features)
        total.zero_()
        for batch in features.split(batch_size):
            total += (batch - mean).square_().sum(0)
        deviation = (total / len(features)).sqrt()
        floor = _CONSTANT_BELOW * torch.maximum(mean.abs(), deviation.max())
        # 0 rather than 1 / floor, so that a feature that varies only in the test set is ignored there.
        scale = torch.where(deviation > floor, 1 / deviation, 0.0)
        return cls(mean.to(dtype), scale.to(dtype))

    def __call__(self, features: Tensor) -> Tensor:
        return (features.to(self.mean.dtype) - self.mean).mul_(self.scale)


@dataclass(frozen=True)
class _Problem:
    """Equation (1) for given rows: features [rows, dim], targets [rows] in 0 .. num_classes - 1."""

    features: Tensor
    targets: Tensor
    num_classes: int
    scaler: _Scaler
    l2: float
    batch_size: int

    def evaluate(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return J and its gradients by weight [classes, dim] and bias [classes], all float64.

        The gradient is written out, (softmax - onehot)^T x, because autograd would keep the logits of
        every batch, or a second copy of them, until the end of it.
        """
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        weight_grad, bias_grad = torch.zeros_like(weight), torch.zeros_like(bias)
        dtype = self.scaler.mean.dtype
        columns, offset = weight.to(dtype).T, bias.to(dtype)
        for rows, target in zip(self.features.split(self.batch_size), self.targets.split(self.batch_size), strict=True):
            x, target = self.scaler(rows), target[:, None]
            log_softmax = torch.addmm(offset, x, columns).log_softmax(dim=1)
            total -= log_softmax.gather(1, target).sum(dtype=torch.float64)
            residual = log_softmax.exp_()
            # One index per row: no two additions meet, so a GPU repeats this bit for bit.
            residual.scatter_add_(1, target, torch.full_like(target, -1, dtype=dtype))
            weight_grad += residual.T @ x
            bias_grad += residual.sum(0, dtype=torch.float64)
        num_rows = len(self.features)
        objective = total / num_rows + self.l2 / 2 * weight.square().sum()
        return objective, weight_grad / num_rows + self.l2 * weight, bias_grad / num_rows


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """The parameters found, float64 and for standardized features, and how the search ended."""

    weight: Tensor
    bias: Tensor
    objective: float
    iterations: int
    converged: bool


def _minimize(problem: _Problem, max_iter: int) -> _Fit:
    """Minimize J by L-BFGS with a strong-Wolfe line search, from zero."""
    dim, device = problem.features.shape[1], problem.features.device
    weight = torch.zeros((problem.num_classes, dim), dtype=torch.float64, device=device)
    bias = torch.zeros(problem.num_classes, dtype=torch.float64, device=device)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        max_eval=max_iter * 25,  # torch's limit for one line search; its default stops before max_iter
        tolerance_grad=_GRADIENT_TOLERANCE,
        tolerance_change=_CHANGE_TOLERANCE,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        objective, weight.grad, bias.grad = problem.evaluate(weight, bias)
        if not objective.isfinite():
            raise NonFiniteError(
                "the objective of the linear probe is not finite",
                where=f"l2={problem.l2}",
                todo="look for extreme feature values, or lower l2",
            )
        return float(objective)

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    # The optimizer keeps its last line search's numbers to itself; one more pass says where it ended.
    objective = closure()
    gradients = [parameter.grad for parameter in (weight, bias) if parameter.grad is not None]
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    return _Fit(
        weight=weight,
        bias=bias,
        objective=objective,
        iterations=optimizer.state[weight]["n_iter"],
        converged=largest <= _CONVERGED_BELOW[problem.scaler.mean.dtype],
    )


def _count_correct(
    fit: _Fit, scaler: _Scaler, classes: Tensor, test: Tensor, test_labels: Tensor, batch_size: int
) -> int:
    """Count the test rows whose most likely class, an entry of `classes` [classes], is their label."""
    weight, bias = fit.weight.to(scaler.mean.dtype), fit.bias.to(scaler.mean.dtype)
    correct = 0
    for rows, labels in zip(test.split(batch_size), test_labels.split(batch_size), strict=True):
        logits = torch.addmm(bias, scaler(rows), weight.T)
        correct += int((classes[logits.argmax(dim=1)] == labels).sum())
    return correct
