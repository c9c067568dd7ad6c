"""The order of an epoch: blocks of all units permuted, rows shuffled in a buffer of successive blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tec_cache.cache.layout import BLOCK_ROWS
from tec_cache.rng import key64, permutation

Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Unit number and row of some positions, two (N,) arrays."""


class EpochOrder:
    """The order of an epoch's rows, a pure function of its arguments.

    counts: rows of each unit. The blocks of all units are permuted; then the rows of every `buffer_blocks` successive
    blocks are shuffled among each other. The shuffle of a buffer is made when its rows are asked for, so that what is
    kept of an epoch grows by 8 bytes a block of 32 rows.
    """

    def __init__(
        self, counts: Sequence[int] | npt.NDArray[np.int64], *, seed: int, epoch: int, buffer_blocks: int
    ) -> None:
        self.seed, self.epoch, self.buffer_blocks = seed, epoch, buffer_blocks
        self._counts = np.asarray(counts, np.int64)
        per_unit = -(-self._counts // BLOCK_ROWS)
        units = np.repeat(np.arange(len(per_unit), dtype=np.int32), per_unit)
        blocks = np.arange(len(units), dtype=np.int32) - np.repeat((np.cumsum(per_unit) - per_unit), per_unit)
        order = permutation(key64("blocks", seed, epoch), len(units))
        self._units, self._blocks = units[order], blocks[order].astype(np.int32)
        ends = np.cumsum(self._sizes(slice(None)))
        # rows before each buffer, and all of them at the end
        self._starts = np.concatenate([[0], ends[buffer_blocks - 1 : -1 : buffer_blocks], ends[-1:]])
        self._shuffled: tuple[int, Places] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def places(self, start: int, stop: int) -> Places:
        """Return unit and row of the positions from start to stop."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        nothing = np.empty(0, np.int64)
        parts = [(nothing, nothing)]
        while start < stop:
            first, end = int(self._starts[number]), int(self._starts[number + 1])
            units, rows = self._buffer(number)
            part = slice(start - first, min(stop, end) - first)
            parts.append((units[part], rows[part]))
            start, number = end, number + 1
        return np.concatenate([units for units, _ in parts]), np.concatenate([rows for _, rows in parts])

    def _sizes(self, blocks: slice) -> npt.NDArray[np.int64]:
        """Return the rows of some blocks: all are whole but those at the ends of units."""
        left = self._counts[self._units[blocks]] - self._blocks[blocks].astype(np.int64) * BLOCK_ROWS
        return np.minimum(BLOCK_ROWS, left)

    def _buffer(self, number: int) -> Places:
        """Shuffle the rows of one buffer; the last one is remembered."""
        if self._shuffled is None or self._shuffled[0] != number:
            blocks = slice(number * self.buffer_blocks, (number + 1) * self.buffer_blocks)
            sizes = self._sizes(blocks)
            units = np.repeat(self._units[blocks].astype(np.int64), sizes)
            firsts = np.repeat(self._blocks[blocks].astype(np.int64) * BLOCK_ROWS, sizes)
            rows = firsts + np.arange(len(units)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            order = permutation(key64("rows", self.seed, self.epoch, number), len(units))
            self._shuffled = number, (units[order], rows[order])
        return self._shuffled[1]
