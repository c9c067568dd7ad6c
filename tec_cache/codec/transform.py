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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tec_cache.codec import ArraySpec
from tec_cache.codec.common import centred, common_arrays, decode_common, encode_common
from tec_cache.codec.grid import GridTransform
from tec_cache.errors import ConfigError, NonFiniteError
from tec_cache.types import Targets, TargetSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_JOINT_ROWS = 1024
"""Most rows of attention H (k+1) that one basis decorrelates: its product grows with their square."""
SPLIT = 524_288
"""Bytes whose bits are shuffled and compressed together: each of the eight planes has 64 KiB. 128 KiB take 1 % more at
the qualities default and high and 1 % less at small, 2 MiB 2 % more (zstd has one Huffman table for 128 KiB)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformCodec:
    """See the module's docstring; `fit.fit_transform` makes one, `to_bytes` and `from_bytes` keep it."""

    name = "transform"
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
        from tec_cache.codec.transform_file import write

        return write(self)

    @staticmethod
    def from_bytes(data: bytes) -> TransformCodec:
        """Read what `to_bytes` wrote. ValueError for anything else."""
        from tec_cache.codec.transform_file import read

        return read(data)

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
