"""One tensor over the token grid as small integers: two linear maps, one quantization step, bytes in a fixed order.

The values (L, M) of a view, token r * columns + c in row r and column c, are decorrelated twice: by the orthonormal
two-dimensional DCT-II over the grid, then by a Karhunen-Loeve basis over the M channels, one for the few low
frequencies and one for the rest (3.5 % fewer bytes than one for all, on ViT-S/14 features). All coefficients share
one step, which is what the smallest mean squared error asks for. A coefficient that is rarely anything but zero
needs a larger magnitude to become one: its bits cost more than its error (`dead_zone`). Readers need not know that;
they multiply the integers by the step.

The integers lie in the order of falling deviation, sign folded into the lowest bit (0, -1, 1, -2, ... are stored as
0, 1, 2, 3, ...): what is alike lies together and small numbers have empty high bits, so that a bit shuffle and
zstd come within 12 % of the entropy of the coefficients taken singly. A byte each, but the first `wide` may need
two: their high bytes come first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F

CPU_VIEWS = 8
"""Views that are decoded together on a CPU."""
NARROW, WIDE = 127, 32_767
"""Largest magnitudes of a code in one byte and in two."""
RATE = 0.05
"""Squared error, in squared steps, that one bit is worth; 0.03 to 0.07 give the same bytes within 0.5 %."""
ROUNDING = 0.5 - RATE
"""Added before rounding down: one level less saves about a bit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GridTransform:
    """How a tensor (B, L, M) becomes codes (B, wide + K) uint8 and comes back."""

    grid_shape: tuple[int, int]
    """Rows and columns of tokens."""
    frequencies: torch.Tensor
    """(L) int64: frequency u * columns + v of each row of coefficients, from low to high."""
    low: int
    """So many of the frequencies use the first basis, the others the second."""
    mean: torch.Tensor
    """(M) float32, taken from every token."""
    basis: torch.Tensor
    """(2, M, M) float32, orthonormal rows: one component each."""
    scan: torch.Tensor
    """(K) int64: where the stored coefficients lie in (L, M) flattened, by falling deviation."""
    deviation: torch.Tensor
    """(K) float32, root mean square of each, larger than zero. Only the encoder uses it."""
    wide: int
    """So many codes have two bytes."""
    step: float
    """Quantization step."""
    _moved: dict[torch.device, GridTransform] = field(default_factory=dict, repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of codes per view."""
        return self.wide + len(self.scan)

    def to(self, device: torch.device) -> GridTransform:
        """Return the same transform on a device; made once for each."""
        if device == self.mean.device:
            return self
        if device not in self._moved:
            names = ("frequencies", "mean", "basis", "scan", "deviation")
            moved = {name: getattr(self, name).to(device) for name in names}
            self._moved[device] = replace(self, **moved, _moved={})
        return self._moved[device]

    def coefficients(self, values: torch.Tensor) -> torch.Tensor:
        """Transform values (B, L, M) to the stored coefficients (B, K) float32."""
        spectrum = grid_dct(values.float() - self.mean, self.grid_shape).index_select(1, self.frequencies)
        mixed = torch.empty_like(spectrum)
        for part, basis in zip((slice(0, self.low), slice(self.low, None)), self.basis, strict=True):
            mixed[:, part] = spectrum[:, part] @ basis.T
        return mixed.flatten(1).index_select(1, self.scan)

    def gain(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return by how much the step of each view must grow for its codes to fit: (B) float32, 1 almost always."""
        limit = torch.full_like(self.deviation, NARROW)
        limit[: self.wide] = WIDE
        return (coefficients.abs() / (limit * self.step)).amax(dim=1).clamp(min=1.0)

    def quantize(self, coefficients: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """Turn coefficients (B, K) into levels (B, K) int32: whole numbers of `step * gain` (B) of each view."""
        scaled = coefficients / (self.step * gain[:, None])
        magnitude = scaled.abs()
        level = (magnitude + ROUNDING).floor().clamp(min=1.0).copysign(scaled)
        return torch.where(magnitude < dead_zone(self.deviation / self.step), 0.0, level).to(torch.int32)

    def pack(self, levels: torch.Tensor) -> torch.Tensor:
        """Fold the signs of levels (B, K) and put the high bytes of the first `wide` before the low bytes: uint8."""
        folded = (levels << 1) ^ (levels >> 31)
        return torch.cat([folded[:, : self.wide] >> 8, folded & 255], dim=1).to(torch.uint8)

    def decode(self, codes: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """Turn codes (B, wide + K) uint8 and gains (B) into values (B, L, M) float32."""
        out = torch.empty(len(codes), len(self.frequencies), len(self.mean), device=codes.device)
        # on a CPU a few views at a time stay in its cache: 0.97 ms per ViT-S view, not 1.6
        few = CPU_VIEWS if codes.device.type == "cpu" else max(1, len(codes))
        for part, scale, values in zip(codes.split(few), (gain * self.step).split(few), out.split(few), strict=True):
            self._decode(part, scale[:, None], values)
        return out

    def _decode(self, codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        """Decode views whose levels are worth `scale` (B, 1) each into `out` (B, L, M)."""
        high, low = codes[:, : self.wide], codes[:, self.wide :]
        levels = ((low >> 1) ^ -(low & 1)).view(torch.int8)
        # one zero more, for the coefficients that are not stored; moving bytes is cheaper than moving floats
        values = F.pad(levels, (0, 1)).gather(1, self._places.expand(len(codes), -1)) * scale
        sign = 1.0 - 2.0 * (low[:, : self.wide] & 1)
        values.index_add_(1, self.scan[: self.wide], 128 * sign * high * scale)
        values, spectrum = values.view(out.shape), torch.empty_like(out)
        for part, basis in zip((slice(0, self.low), slice(self.low, None)), self.basis, strict=True):
            torch.matmul(values[:, part], basis, out=spectrum[:, part])
        spectrum = spectrum.index_select(1, self._natural)
        spectrum[:, 0] += self.mean * math.sqrt(len(self.frequencies))  # what all tokens share is frequency zero
        grid_dct(spectrum, self.grid_shape, inverse=True, out=out)

    @cached_property
    def _natural(self) -> torch.Tensor:
        """Where each frequency lies among the rows of coefficients: (L) int64."""
        return self.frequencies.argsort()

    @cached_property
    def _places(self) -> torch.Tensor:
        """Where each of the L * M coefficients lies among the K that are stored, K if it does not: int64."""
        places = self.scan.new_full((len(self.frequencies) * len(self.mean),), len(self.scan))
        return places.index_copy(0, self.scan, torch.arange(len(self.scan), device=self.scan.device))


def frequency_order(grid_shape: tuple[int, int]) -> torch.Tensor:
    """Sort the frequencies u * columns + v of a grid by (u / rows)^2 + (v / columns)^2, ties by number: (L) int64."""
    rows, columns = grid_shape
    u, v = torch.arange(rows)[:, None] * columns, torch.arange(columns)[None] * rows
    return (u * u + v * v).flatten().argsort(stable=True)


def num_low(num_tokens: int) -> int:
    """Return how many frequencies have a basis of their own: a tenth (a twentieth to a fifth do as well)."""
    return max(1, round(num_tokens / 10))


def grid_dct(
    values: torch.Tensor, grid_shape: tuple[int, int], *, inverse: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply the orthonormal DCT-II (or its inverse, the DCT-III) over both axes of the grid to (B, L, M)."""
    rows, columns = grid_shape
    batch, length, channels = values.shape
    down, across = (dct_matrix(n, values.device) for n in grid_shape)
    if inverse:
        down, across = down.T, across.T
    values = (down @ values.reshape(batch, rows, columns * channels)).view(batch * rows, columns, channels)
    result = torch.matmul(across, values, out=None if out is None else out.view(values.shape))
    return result.view(batch, length, channels)


@lru_cache(maxsize=16)
def dct_matrix(size: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the orthonormal DCT-II as a matrix (size, size) float32: row u is the wave of frequency u.

    Made on the host, so that every device has the same one, and once. Not to be changed in place.
    """
    positions = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / size * positions[:, None] * (positions[None] + 0.5)) * math.sqrt(2 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix.float().to(device)


def dead_zone(deviation: torch.Tensor) -> torch.Tensor:
    """Return the magnitude, in steps, below which a coefficient becomes zero.

    deviation: root mean square of the coefficients, in steps. The first level costs the bits that tell it from
    zero; they are worth `RATE` each, and follow from a Laplace distribution of that deviation. The zone decides the
    bits and the bits the zone: a few rounds settle it.
    """
    slope = math.sqrt(2) / deviation.double()
    zone = torch.full_like(slope, 0.6)
    for _ in range(8):
        reach = torch.exp(-slope * zone)  # probability of a level beyond the zone
        first = 1 - torch.exp(-slope * (1 + (1 - ROUNDING) - zone).clamp(min=0.1))  # of these, the first level
        bits = 1 + (1 - reach).clamp(min=1e-3).log2() + slope * zone / math.log(2) - first.clamp(min=1e-3).log2()
        zone = (0.5 + RATE * bits).clamp(0.5, 4.0)
    return zone.to(deviation.dtype)
