"""transform: a linear transform fitted to a base's own targets, and small integers for a standard compressor.

Arrays per view, for a spec with C channels, H heads, k + 1 rows and L tokens:

- `features` uint8 (wide + K): codes of the coefficients of the features (L, C); see grid.py.
- `attention` uint8 (wide + K): the same of the logits (H, k+1, L) without their rows' means, whose channels are the
  H (k+1) rows. Where these are more than `MAX_JOINT_ROWS` (all patches are rows), uint8 (k+1, wide + K): the channels
  are the heads, and each row is coded like a view.
- `gain` float32 (1) or (2): by how much the step of the features (and of the attention) grew for this view, because
  a code would not have fitted; 1 almost always.
- `rows`, `class_token`: as in every codec, see common.py.

To decode, with the tensors and numbers of `to_bytes` (all of the features; the attention is alike):

    high, low_byte = codes[:wide], codes[wide:]
    folded = low_byte + 256 * (high, then zeros)
    level = folded / 2 where folded is even, -(folded + 1) / 2 where it is odd
    Y = zeros(L * C);  Y[scan] = level * step * gain;  Y = Y.reshape(L, C)
    Y[:low] = Y[:low] @ basis[0];  Y[low:] = Y[low:] @ basis[1]
    G = zeros(L, C);  G[frequencies] = Y
    features = inverse orthonormal DCT-II of G.reshape(rows, columns, C) over rows and columns, + mean

`to_bytes` gives one safetensors file: tensors, and one metadata entry `codec` of canonical JSON.

    {"name": "transform", "version": 1, "spec": {...}, "mse": 0.04, "kl": 0.03,
     "features": {"low": ..., "step": ..., "wide": ...}, "attention": the same, or null}

Tensors: `frequencies` (L) int32, and of features and attention each `X.mean` (M) float32, `X.basis` (2, M, M)
float32, `X.scan` (K) int32 and `X.deviation` (K) float32. Whatever is not exactly this is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from tec_cache.codec.codec import ArraySpec
from tec_cache.codec.common import centred, common_arrays, decode_common, encode_common
from tec_cache.codec.grid import GridTransform
from tec_cache.errors import ConfigError, NonFiniteError
from tec_cache.types import Targets, TargetSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

NAME, VERSION = "transform", 1
ENTRY = "codec"
"""Of the file's metadata."""
_PARTS = ("mean", "basis", "scan", "deviation")

MAX_JOINT_ROWS = 1024
"""Most rows of attention H (k+1) that one basis decorrelates: its product grows with their square."""
SPLIT = 524_288
"""Bytes whose bits are shuffled and compressed together: each of the eight planes has 64 KiB. 128 KiB take 1 % more at
the qualities default and high and 1 % less at small, 2 MiB 2 % more (zstd has one Huffman table for 128 KiB)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformCodec:
    """See the module's docstring; `fit.fit_transform` makes one, `to_bytes` and `from_bytes` keep it."""

    name = NAME
    spec: TargetSpec
    mse: float
    """Relative mean squared error that was asked for."""
    kl: float | None
    """KL divergence that was asked for, nats; None without an attention target."""
    features: GridTransform
    attention: GridTransform | None

    def arrays(self, spec: TargetSpec) -> dict[str, ArraySpec]:
        """Name the stored arrays."""
        self._check(spec)
        stored = {"features": _codes((self.features.num_bytes,), (1, 0))}
        if self.attention is not None:
            size = self.attention.num_bytes
            joint = joint_rows(spec)
            stored["attention"] = _codes((size,), (1, 0)) if joint else _codes((spec.num_rows, size), (2, 1, 0))
        stored["gain"] = ArraySpec((len(stored),), "float32", (1, 0), dimensions=("tensor",))
        return stored | common_arrays(spec)

    @torch.no_grad()
    def encode(self, targets: Targets, spec: TargetSpec) -> dict[str, npt.NDArray[np.generic]]:
        """Transform and quantize on the targets' device. NonFiniteError for what is not a number."""
        self._check(spec)
        codes, gain = _encode(self.features, targets.features, "features")
        stored, gains = {"features": codes}, [gain]
        if self.attention is not None:
            if targets.attention is None:
                raise ConfigError("this codec was fitted for an attention target, and there is none")
            codes, gain = _encode(self.attention, to_channels(targets.attention, spec), "attention logits")
            stored["attention"], gains = codes, [*gains, gain]
        stored["gain"] = torch.stack(gains, dim=1)
        return {name: array.cpu().numpy() for name, array in stored.items()} | encode_common(targets, spec)

    @torch.no_grad()
    def decode(self, arrays: dict[str, torch.Tensor], spec: TargetSpec) -> Targets:
        """Give the targets back, float32 on the arrays' device."""
        self._check(spec)
        codes, gain = arrays["features"], arrays["gain"].float()
        features = _decode(self.features, codes, gain[:, 0])
        rows, token = decode_common(arrays, spec, len(codes), codes.device)
        if self.attention is None:
            return Targets(features, rows=rows, class_token=token)
        values = _decode(self.attention, arrays["attention"], gain[:, 1])
        return Targets(features, from_channels(values, spec), rows, token)

    def to_bytes(self) -> bytes:
        """Write everything down as one safetensors file; the same codec gives the same bytes."""
        return _written(self)

    @staticmethod
    def from_bytes(data: bytes) -> TransformCodec:
        """Read what `to_bytes` wrote. ValueError for anything else."""
        return _read(data)

    def _check(self, spec: TargetSpec) -> None:
        if spec != self.spec:
            raise ConfigError(f"this codec was fitted for {self.spec}, not for {spec}", todo="fit one for them")


def joint_rows(spec: TargetSpec) -> bool:
    """Say whether one basis spans all rows of attention, not the heads only."""
    return spec.num_heads * spec.num_rows <= MAX_JOINT_ROWS


def to_channels(attention: torch.Tensor, spec: TargetSpec) -> torch.Tensor:
    """Arrange logits (B, H, k+1, L) as values over the grid: (B, L, H (k+1)), or (B, k+1, L, H); row means removed."""
    logits = centred(attention)
    if joint_rows(spec):
        return logits.flatten(1, 2).transpose(1, 2)
    return logits.permute(0, 2, 3, 1)


def from_channels(values: torch.Tensor, spec: TargetSpec) -> torch.Tensor:
    """Undo `to_channels`: (B, H, k+1, L)."""
    if joint_rows(spec):
        return values.transpose(1, 2).unflatten(1, (spec.num_heads, spec.num_rows))
    return values.permute(0, 3, 1, 2)


def _codes(shape: tuple[int, ...], order: tuple[int, ...]) -> ArraySpec:
    names = ("row", "coefficient")[-len(shape) :]
    return ArraySpec(shape, "uint8", order, "bitshuffle", SPLIT, names)


def _encode(grid: GridTransform, values: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Code values (B, ..., L, M): codes (B, ..., bytes) uint8 and gains (B) float32."""
    lead = values.shape[:-2]
    moved = grid.to(values.device)
    coefficients = moved.coefficients(values.reshape(-1, *values.shape[-2:]))
    gain = repeated = moved.gain(coefficients)
    if len(lead) > 1:  # all rows of a view share its gain
        gain = gain.view(lead).amax(dim=1)
        repeated = gain.repeat_interleave(lead[1])
    if not (gain < float("inf")).all():  # which a NaN is not either
        raise NonFiniteError(f"{what} that are not finite cannot be coded")
    return moved.pack(moved.quantize(coefficients, repeated)).view(*lead, -1), gain


def _decode(grid: GridTransform, codes: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Give values (B, ..., L, M) back from codes (B, ..., bytes) and gains (B)."""
    moved, lead = grid.to(codes.device), codes.shape[:-1]
    repeated = gain.repeat_interleave(lead[1]) if len(lead) > 1 else gain
    with torch.autocast(codes.device.type, enabled=False):
        values = moved.decode(codes.flatten(0, -2), repeated)
    return values.view(*lead, *values.shape[1:])


def _written(codec: TransformCodec) -> bytes:
    """Return the file; one metadata entry, because the order of several is not fixed."""
    grids = {"features": codec.features, "attention": codec.attention}
    tensors = {"frequencies": codec.features.frequencies.int()}
    about: dict[str, Any] = {"name": codec.name, "version": VERSION, "spec": codec.spec.to_json()}
    about |= {"mse": codec.mse, "kl": codec.kl}
    for name, grid in grids.items():
        about[name] = None if grid is None else {"low": grid.low, "step": grid.step, "wide": grid.wide}
        if grid is not None:
            values = (grid.mean, grid.basis, grid.scan.int(), grid.deviation)
            tensors |= {f"{name}.{part}": value for part, value in zip(_PARTS, values, strict=True)}
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(cpu, {ENTRY: json.dumps(about, sort_keys=True, separators=(",", ":"))})


def _read(data: bytes) -> TransformCodec:
    """Read the file and check that a codec can be made of it. ValueError says what is wrong."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][ENTRY])
        spec = TargetSpec(**about["spec"])
        names = ["features", "attention"] if spec.num_rows else ["features"]
        wanted = {"name", "version", "spec", "mse", "kl", "features", "attention"}
        _check(set(about) == wanted, f"its entries are {sorted(about)}")
        _check(about["name"] == NAME, f"it is a {about['name']!r}")
        _check(about["version"] == VERSION, f"its version is {about['version']!r}, this program reads {VERSION}")
        expected = {"frequencies", *(f"{name}.{part}" for name in names for part in _PARTS)}
        _check(set(tensors) == expected, f"its tensors are {sorted(tensors)}")
        _check(spec.num_rows > 0 or about["attention"] is None, "attention where the spec has none")
        _check(_positive(about["mse"]) and (about["kl"] is None or _positive(about["kl"])), "its errors are no numbers")
        grids = {name: _grid(name, about[name], tensors, spec) for name in names}
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a transform codec: {type(error).__name__}: {error}") from error
    return TransformCodec(
        spec=spec,
        mse=about["mse"],
        kl=about["kl"],
        features=grids["features"],
        attention=grids.get("attention"),
    )


def _grid(name: str, about: dict[str, Any], tensors: dict[str, torch.Tensor], spec: TargetSpec) -> GridTransform:
    """Check and make the transform of one tensor."""
    width = spec.channels
    if name == "attention":
        width = spec.num_heads * spec.num_rows if joint_rows(spec) else spec.num_heads
    length = spec.num_tokens
    mean, basis, scan, deviation = (tensors[f"{name}.{part}"] for part in _PARTS)
    frequencies = tensors["frequencies"]
    _check(set(about) == {"low", "step", "wide"}, f"the entries of {name} are {sorted(about)}")
    _check(mean.shape == (width,) and basis.shape == (2, width, width), f"{name}: mean or basis of another shape")
    _check(scan.ndim == 1 and 0 < len(scan) <= length * width, f"{name}: {tuple(scan.shape)} coefficients")
    _check(deviation.shape == scan.shape, f"{name}: deviations of another shape")
    _check(
        all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in (mean, basis, deviation)), f"{name}: values"
    )
    _check(all(t.dtype == torch.int32 for t in (scan, frequencies)), f"{name}: positions are not int32")
    _check(frequencies.shape == (length,), "its frequencies")  # before as many numbers are made to compare with
    _check(torch.equal(frequencies.sort().values, torch.arange(length, dtype=torch.int32)), "its frequencies")
    places = scan.unique()
    _check(len(places) == len(scan) and int(places[0]) >= 0 and int(places[-1]) < length * width, f"{name}: positions")
    _check(bool((deviation >= 0).all()), f"{name}: a deviation below zero")
    product = basis @ basis.transpose(1, 2)
    _check(bool(((product - torch.eye(width)).abs() < 1e-3).all()), f"{name}: the basis is not orthonormal")
    low, wide, step = about["low"], about["wide"], about["step"]
    _check(type(low) is int and 0 <= low <= length, f"{name}: low is {low!r}")
    _check(type(wide) is int and 0 <= wide <= len(scan), f"{name}: wide is {wide!r}")
    _check(_positive(step), f"{name}: the step is {step!r}")
    return GridTransform(
        grid_shape=spec.grid_shape,
        frequencies=frequencies.long(),
        low=low,
        mean=mean,
        basis=basis,
        scan=scan.long(),
        deviation=deviation,
        wide=wide,
        step=step,
    )


def _positive(value: Any) -> bool:
    return type(value) is float and 0 < value < float("inf")


def _check(right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"not a transform codec: {what}")
