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
from typing import NamedTuple

import torch
import torch.nn.functional as F

CPU_VALUES = 600_000
"""Values that are decoded together on a CPU: they stay in its cache, which takes a third less time than all at once."""
PIECES = 4
"""Groups of high frequencies that are decoded with as many components as they store. A quarter of the products is
saved (ViT-S/14, quality default); six groups save no more, because each is a call of its own."""
SHRINK = 2.0**-8
"""Levels times this are multiplied in half precision: 128 at most, so that no sum of 100,000 leaves its range."""
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
        spectrum = grid_dct(values.float() - self.mean, self.grid_shape)
        parts = self.frequencies[: self.low], self.frequencies[self.low :]
        mixed = [spectrum.index_select(1, part) @ basis.T for part, basis in zip(parts, self.basis, strict=True)]
        return torch.cat(mixed, dim=1).flatten(1).index_select(1, self.scan)

    def gain(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return by how much the step of each view must grow for its codes to fit: (B) float32, 1 almost always."""
        return (coefficients.abs() / self._limits).amax(dim=1).clamp_(min=1.0)

    def quantize(self, coefficients: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """Turn coefficients (B, K) into levels (B, K) int32: whole numbers of `step * gain` (B) of each view."""
        scaled = coefficients / (self.step * gain[:, None])
        magnitude = scaled.abs()
        level = (magnitude + ROUNDING).floor_().clamp_(min=1.0).masked_fill_(magnitude < self._zone, 0.0)
        return level.copysign_(scaled).to(torch.int32)

    def pack(self, levels: torch.Tensor) -> torch.Tensor:
        """Fold the signs of levels (B, K) and put the high bytes of the first `wide` before the low bytes: uint8."""
        folded = (levels << 1) ^ (levels >> 31)
        if self.wide:
            folded = torch.cat([folded[:, : self.wide] >> 8, folded], dim=1)
        return folded.to(torch.uint8)  # which keeps the low byte

    def decode(self, codes: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """Turn codes (B, wide + K) uint8 and gains (B) into values (B, L, M) float32.

        On a GPU the products with the basis are of half precision, see `product_dtype`.
        """
        length, width = len(self.frequencies), len(self.mean)
        out = torch.empty(len(codes), length, width, device=codes.device)
        few = max(1, CPU_VALUES // (length * width) if codes.device.type == "cpu" else len(codes))
        for part, scale, values in zip(codes.split(few), (gain * self.step).split(few), out.split(few), strict=True):
            self._decode(part, scale, values)
        return out

    def _decode(self, codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        """Decode views whose levels are worth `scale` (B) each into `out` (B, L, M)."""
        plan, dtype, views = self._plan, product_dtype(codes.device), len(codes)
        high, low = codes[:, : self.wide], codes[:, self.wide :]
        # one zero more, for the coefficients that are not stored
        levels = F.pad(((low >> 1) ^ -(low & 1)).view(torch.int8), (0, 1))
        # pieces lie one behind the other, each with all views: a product is one of large matrices, without a copy
        narrow = levels.new_empty(views * plan.width)
        for piece in plan.pieces:  # moving bytes is cheaper than moving floats
            place = piece.places.expand(views, -1)
            torch.gather(levels, 1, place, out=narrow[piece.start * views :][: place.numel()].view(place.shape))
        values = narrow.to(dtype)
        if self.wide:
            more = (128 - 256 * (low[:, : self.wide] & 1).short()) * high
            values.index_add_(0, plan.wide.of(views), more.flatten().to(dtype))
        if dtype == torch.float16:
            values *= SHRINK
            scale = scale / SHRINK
        mixed = values.new_empty(views * out.shape[1], out.shape[2])
        for piece in plan.pieces:
            part = values[piece.start * views :][: len(piece.places) * views].view(-1, len(piece.basis))
            torch.mm(part, piece.basis, out=mixed[piece.row * views :][: len(part)])
        spectrum = mixed.index_select(0, plan.rows.of(views)).view(out.shape).float()
        spectrum[:, 0] += self._wave / scale[:, None]  # what all tokens share is frequency zero
        grid_dct(spectrum, self.grid_shape, inverse=True, scale=scale, out=out)

    # What follows depends on nothing but the parameters. It is made on the host, so that every device has the same, and
    # copied: a copy is done when the call returns, whatever stream its caller, or another thread, works on.

    @cached_property
    def _limits(self) -> torch.Tensor:
        """The largest magnitude that each code can have: (K) float32."""
        limit = torch.full((len(self.scan),), float(NARROW))
        limit[: self.wide] = WIDE
        return (limit * self.step).to(self.scan.device)

    @cached_property
    def _zone(self) -> torch.Tensor:
        """Below how many steps each coefficient becomes zero: (K) float32."""
        return dead_zone(self.deviation.cpu() / self.step).to(self.scan.device)

    @cached_property
    def _wave(self) -> torch.Tensor:
        """The mean as a coefficient of frequency zero: (M) float32."""
        return (self.mean.cpu() * math.sqrt(len(self.frequencies))).to(self.scan.device)

    @cached_property
    def _plan(self) -> _Plan:
        """How codes are laid out for the products: the low frequencies, then the others in `PIECES` groups."""
        device, length, width = self.scan.device, len(self.frequencies), len(self.mean)
        scan, basis = self.scan.cpu(), self.basis.cpu().to(product_dtype(device)).to(device)
        code = torch.full((length * width,), len(scan)).index_copy(0, scan, torch.arange(len(scan)))
        code, stored = code.view(length, width), torch.zeros(length, dtype=torch.int64)
        stored.scatter_reduce_(0, scan // width, scan % width + 1, "amax")
        others = torch.arange(self.low, length)
        others = others[stored[others].argsort(descending=True, stable=True)]
        groups = [(basis[0], torch.arange(self.low)), *((basis[1], part) for part in others.tensor_split(PIECES))]
        pieces: list[_Piece] = []
        values: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        column = row = 0
        for of_group, group in groups:
            if len(group):
                # a multiple of what a processor loads at once, and never none
                count = min(width, -(-max(1, int(stored[group].max())) // 8) * 8)
                places = code[group, :count].flatten()
                pieces.append(_Piece(places.to(device), of_group[:count], column, row))
                values.append(places)
                rows.append(group)
                column, row = column + len(places), row + len(group)
        order = self.frequencies.cpu()[torch.cat(rows)].argsort()
        wide = torch.cat(values).argsort(stable=True)[: self.wide]  # each code but the zero has one place
        return _Plan(pieces, column, _Positions(values, wide, device), _Positions(rows, order, device))


class _Piece(NamedTuple):
    """Some frequencies that are decoded in one product, with their first `n` components."""

    places: torch.Tensor
    """Which of the K stored codes each coefficient is, K where it is none: (rows * n) int64."""
    basis: torch.Tensor
    """(n, M) in the type of the product."""
    start: int
    """Coefficients of a view in the pieces before."""
    row: int
    """Frequencies in the pieces before."""


class _Positions:
    """Where some entries lie, once each piece has been laid down for all views."""

    def __init__(self, pieces: list[torch.Tensor], entries: torch.Tensor, device: torch.device) -> None:
        """pieces: each one's entries for one view. entries: (n) int64, places in all pieces of one view."""
        sizes = torch.tensor([len(piece) for piece in pieces])
        piece = torch.repeat_interleave(sizes)[entries]
        self._start, self._size, self._device = (sizes.cumsum(0) - sizes)[piece], sizes[piece], device
        self._within = entries - self._start
        self._last: tuple[int, torch.Tensor] = (0, entries[:0].to(device))

    def of(self, views: int) -> torch.Tensor:
        """Return the positions in every view, view by view: (views * n) int64, made once for a number of views."""
        made, positions = self._last
        if made != views:
            view = torch.arange(views)[:, None]
            positions = (self._start * views + self._within + view * self._size).flatten().to(self._device)
            self._last = views, positions
        return positions


class _Plan(NamedTuple):
    """See `GridTransform._plan`."""

    pieces: list[_Piece]
    width: int
    """Coefficients of a view in all pieces."""
    wide: _Positions
    """Of the coefficients whose codes have a high byte."""
    rows: _Positions
    """Of the frequencies in their natural order."""


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which levels are multiplied by the basis.

    Half precision on a GPU, whose matrix units are made for it. Levels up to 2,048 are whole numbers and stay exact,
    the basis and the products are rounded to 11 bits, as TF32 rounds: a relative squared error of 9e-8 (TF32: 4e-8),
    where the quantization's is 4e-2 (2e-2 at quality high; ViT-S/14). Unlike TF32 it takes no switch of the whole
    process. Encoding stays float32: TF32 would flip one code in 4,000, and is switched for the base's thread as well.
    """
    return torch.float16 if device.type == "cuda" else torch.float32


def frequency_order(grid_shape: tuple[int, int]) -> torch.Tensor:
    """Sort the frequencies u * columns + v of a grid by (u / rows)^2 + (v / columns)^2, ties by number: (L) int64."""
    rows, columns = grid_shape
    u, v = torch.arange(rows)[:, None] * columns, torch.arange(columns)[None] * rows
    return (u * u + v * v).flatten().argsort(stable=True)


def num_low(num_tokens: int) -> int:
    """Return how many frequencies have a basis of their own: a tenth (a twentieth to a fifth do as well)."""
    return max(1, round(num_tokens / 10))


def grid_dct(
    values: torch.Tensor,
    grid_shape: tuple[int, int],
    *,
    inverse: bool = False,
    scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the orthonormal DCT-II (or its inverse, the DCT-III) over both axes of the grid to (B, L, M).

    scale: (B), by which each view is multiplied on the way.
    """
    rows, columns = grid_shape
    batch, length, channels = values.shape
    down, across = (dct_matrix(n, values.device) for n in grid_shape)
    if inverse:
        down, across = down.T, across.T
    if scale is not None:
        down = down * scale[:, None, None]
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
