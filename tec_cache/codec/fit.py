"""Fit a transform codec to a sample of targets: basis from most of the views, quantization step on the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from tec_cache.codec.errors import row_divergence
from tec_cache.codec.grid import NARROW, WIDE, GridTransform, frequency_order, grid_dct, num_low
from tec_cache.codec.transform import TransformCodec, from_channels, to_channels
from tec_cache.errors import ConfigError, NonFiniteError
from tec_cache.types import Targets, TargetSpec

CHUNK = 32
"""Views that are widened to float32 at a time."""
CALIBRATION = 4
"""One view in so many, the last ones, is kept from the basis and sets the step."""
DROPPED = 0.4
"""Coefficients whose deviation is below so many steps are not stored: 30 % of them, which are almost always zero. At
the same error that takes 1 % fewer bytes than 0.2 (ViT-S/14 features), and less time to decode; 0.55 takes 3 % more."""
ROUNDS = 14
"""Of bisection over 14 octaves: the step is found to 0.1 %."""

Values = Callable[[slice], torch.Tensor]
"""Gives some views of the sample as (B', L, M) float32."""


@torch.no_grad()
def fit_transform(targets: Targets, spec: TargetSpec, *, mse: float, kl: float | None = None) -> TransformCodec:
    """Fit a codec whose errors on views like these are what was asked for, or a little less.

    targets: normalized features (N, L, C) and logits (N, H, k+1, L), any floating type and device; rows are not
    used. mse: relative mean squared error of the features, error over energy around the channels' means.
    kl: mean KL divergence of the attention rows at tau 1 in nats; needed where the spec has attention.
    The last quarter of the views sets the steps, so they should come from photos that the others do not show; the
    error asked for is held there with two standard errors of its mean to spare. On one machine the same targets
    give the same codec. ConfigError for errors that cannot be reached, NonFiniteError for such targets.
    """
    if len(targets.features) == 0:
        raise ConfigError("a codec cannot be fitted to no views")
    if not 0 < mse < 1:
        raise ConfigError(f"a relative mean squared error of {mse}", todo="ask for one between 0 and 1")
    features = _fit_grid(lambda part: targets.features[part].float(), len(targets.features), spec, None, mse)
    if not spec.num_rows:
        return TransformCodec(spec=spec, mse=mse, kl=None, features=features, attention=None)
    logits = targets.attention
    if logits is None:
        raise ConfigError("the spec has an attention target, these targets have none")
    if kl is None or not kl > 0:
        raise ConfigError(f"a KL divergence of {kl}", todo="ask for one larger than 0")

    def channels(part: slice) -> torch.Tensor:
        return to_channels(logits[part], spec).flatten(0, -3)

    attention = _fit_grid(channels, len(logits), spec, logits, kl)
    return TransformCodec(spec=spec, mse=mse, kl=kl, features=features, attention=attention)


def _fit_grid(values: Values, count: int, spec: TargetSpec, logits: torch.Tensor | None, asked: float) -> GridTransform:
    """Fit one tensor's transform: by the divergence of the rows where logits are given, else by the squared error."""
    calibration = count // CALIBRATION if count >= CALIBRATION else int(count > 1)
    fitted = count - calibration
    held = slice(fitted, count) if calibration else slice(0, count)
    grid, peak = _basis(lambda: _chunks(values, fitted), spec.grid_shape)
    if not float(peak.max()):
        return grid  # every view is the mean
    coefficients = torch.cat([grid.coefficients(x) for x in _chunks(values, held.stop, held.start)])
    _check_finite(coefficients)
    if logits is None:
        energy = coefficients.double().square().sum(1)

        def errors(trial: GridTransform) -> torch.Tensor:
            levels, gain = _coded(trial, coefficients, len(coefficients))
            stored = coefficients[:, : levels.shape[1]]
            kept = stored.square().sum(1) - (stored - levels * gain[:, None] * trial.step).square().sum(1)
            return (energy - kept) / energy.mean()
    else:
        exact = logits[held]
        per_view = coefficients.view(len(exact), -1, coefficients.shape[1])

        def errors(trial: GridTransform) -> torch.Tensor:
            found = []
            for rows, part in zip(exact.split(CHUNK), per_view.split(CHUNK), strict=True):
                levels, gain = _coded(trial, part.flatten(0, 1), len(part))
                decoded = trial.decode(trial.pack(levels), gain)
                shaped = decoded.unflatten(0, part.shape[:2]) if part.shape[1] > 1 else decoded
                found.append(row_divergence(rows, from_channels(shaped, spec)).mean(dim=(1, 2)))
            return torch.cat(found)

    return _calibrate(grid, peak, errors, asked)


def _basis(chunks: Callable[[], Iterator[torch.Tensor]], shape: tuple[int, int]) -> tuple[GridTransform, torch.Tensor]:
    """Fit mean, bases and deviations; returns the transform with a step of 1 and the largest magnitude of each code."""
    total = sum((x.double().sum(0) for x in chunks()), torch.zeros(()))
    count = sum(len(x) for x in chunks())
    _check_finite(total)
    device, (length, width) = total.device, total.shape
    mean = (total.sum(0) / (count * length)).float()
    order, low = frequency_order(shape).to(device), num_low(length)
    energy = torch.zeros(2, width, width, dtype=torch.float64, device=device)
    for x in chunks():
        spectrum = grid_dct(x - mean, shape)[:, order].double()
        for i, part in enumerate((spectrum[:, :low], spectrum[:, low:])):
            flat = part.reshape(-1, width)
            energy[i] += flat.T @ flat
    # with few views the covariance of the low frequencies is unsure: it is drawn towards that of all
    energy += energy.sum(0) * (width / (count * length))
    grid = GridTransform(
        grid_shape=shape,
        frequencies=order,
        low=low,
        mean=mean,
        basis=torch.stack([_components(e) for e in energy]).float().to(device),
        scan=torch.arange(length * width, device=device),
        deviation=torch.ones(length * width, device=device),
        wide=0,
        step=1.0,
    )
    square = torch.zeros(length * width, dtype=torch.float64, device=device)
    peak = torch.zeros(length * width, device=device)
    for x in chunks():
        y = grid.coefficients(x)
        square += y.double().square().sum(0)
        peak = torch.maximum(peak, y.abs().amax(0))
    deviation = (square / count).sqrt().float()
    kept = deviation > 1e-5 * deviation.max()  # what a normalization makes zero is never stored
    scan = deviation.argsort(descending=True, stable=True)[: max(1, int(kept.sum()))]
    return replace(grid, scan=scan, deviation=deviation[scan], _moved={}), peak[scan]


def _components(covariance: torch.Tensor) -> torch.Tensor:
    """Return the eigenvectors as rows by falling eigenvalue, the largest entry of each positive: float64, CPU."""
    vectors = torch.linalg.eigh(covariance.cpu()).eigenvectors.flip(1).T
    sign = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    return (vectors * sign).contiguous()


def _calibrate(
    grid: GridTransform, peak: torch.Tensor, errors: Callable[[GridTransform], torch.Tensor], asked: float
) -> GridTransform:
    """Find the largest step whose error, with two standard errors of the mean, is not above what was asked."""

    def meets(step: float) -> bool:
        found = errors(_with_step(grid, peak, step))
        spare = 2 * float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else 0.25 * float(found.mean())
        return float(found.mean()) + spare <= asked

    largest, smallest = float(peak.max()), float(peak.max()) / (WIDE // 2)
    if meets(largest):
        return _with_step(grid, peak, largest)
    if not meets(smallest):
        raise ConfigError(f"an error of {asked} cannot be reached with codes of two bytes", todo="ask for a larger one")
    fine, coarse = smallest, largest
    for _ in range(ROUNDS):
        step = math.sqrt(fine * coarse)
        fine, coarse = (step, coarse) if meets(step) else (fine, step)
    return _with_step(grid, peak, fine)


def _with_step(grid: GridTransform, peak: torch.Tensor, step: float) -> GridTransform:
    """Set the step; drop what is almost always zero, give two bytes to what reached half of one byte's range."""
    count = max(1, int((grid.deviation >= DROPPED * step).sum()))
    beyond = (peak[:count] > NARROW / 2 * step).nonzero()
    wide = int(beyond.max()) + 1 if len(beyond) else 0
    return replace(grid, scan=grid.scan[:count], deviation=grid.deviation[:count], wide=wide, step=step, _moved={})


def _coded(grid: GridTransform, coefficients: torch.Tensor, views: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize coefficients (B', all that were fitted) as `encode` would: levels and gains (B')."""
    stored = coefficients[:, : len(grid.scan)]
    gain = grid.gain(stored).view(views, -1).amax(dim=1).repeat_interleave(len(stored) // views)
    return grid.quantize(stored, gain), gain


def _check_finite(values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        raise NonFiniteError("a codec cannot be fitted to targets that are not finite")


def _chunks(values: Values, stop: int, start: int = 0) -> Iterator[torch.Tensor]:
    for first in range(start, stop, CHUNK):
        yield values(slice(first, min(first + CHUNK, stop)))
