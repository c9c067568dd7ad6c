"""The transform codec as one safetensors file: tensors, and one metadata entry `codec` of canonical JSON.

    {"name": "transform", "version": 1, "spec": {...}, "mse": 0.04, "kl": 0.03,
     "features": {"low": ..., "step": ..., "wide": ...}, "attention": the same, or null}

Tensors: `frequencies` (L) int32, and of features and attention each `X.mean` (M) float32, `X.basis` (2, M, M)
float32, `X.scan` (K) int32 and `X.deviation` (K) float32. Whatever is not exactly this is refused.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from tec_cache.codec.grid import GridTransform
from tec_cache.codec.transform import TransformCodec, joint_rows
from tec_cache.types import TargetSpec

NAME, VERSION = "transform", 1
ENTRY = "codec"
_PARTS = ("mean", "basis", "scan", "deviation")


def write(codec: TransformCodec) -> bytes:
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


def read(data: bytes) -> TransformCodec:
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
