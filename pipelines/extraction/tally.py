"""What the stages of an extraction have done, in one line of progress that names the slowest of them."""

from __future__ import annotations

import threading

from pipelines.extraction.storage import Needed
from tec_cache.busy import Busy, TimedPool, bottleneck
from tec_cache.printable import counted
from tec_cache.progress import Progress

READING, DECODING, CROPS, BASE, CODING, WRITING = (
    "reading photos", "decoding photos", "writing crops", "the base", "coding", "writing targets"
)  # fmt: skip
"""Stages; "decoding photos" is all that the pool does: photos to crops, and stored crops to pixels."""

WRITERS = 2
"""Units of targets that are compressed and written at the same time."""


class Tally:
    """Counts for all stages, which call it from threads of their own."""

    def __init__(self, progress: Progress, needed: Needed, pool: TimedPool, *, targets: bool) -> None:
        self.busy = Busy({DECODING: pool.workers, WRITING: WRITERS})
        pool.watch = lambda seconds: self.busy.add(DECODING, seconds)
        self.views_made = self.targets_made = 0
        self._progress, self._needed, self._targets = progress, needed, targets
        self._skipped = 0
        self._lock = threading.Lock()

    def cut(self, size: float, crops: int, num_bytes: int) -> None:
        """A unit of crops was committed, from so much of the source."""
        with self._lock:
            self.views_made += crops
        self._needed.passed(size, crops, num_bytes)
        self._advance(0 if self._targets else crops, num_bytes)

    def passed(self, size: float, skipped: int = 0) -> None:
        """So much of the source has nothing left to be cut; so many photos of a group were left out."""
        self._skipped += skipped
        self._needed.passed(size)

    def coded(self, rows: int) -> None:
        """A batch of targets was coded."""
        self._advance(rows)

    def written(self, rows: int, num_bytes: int) -> None:
        """A unit of targets was committed."""
        with self._lock:
            self.targets_made += rows
        self._needed.coded(rows, num_bytes)
        self._advance(0, num_bytes)

    def found(self, rows: int) -> None:
        """A unit of targets was made by another job meanwhile."""
        self._needed.coded(rows)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the time that each stage was at work."""
        return self.busy.shares

    def _advance(self, items: int, num_bytes: int = 0) -> None:
        left = self._needed.targets_left if self._targets else 0
        made = self.targets_made if self._targets else self.views_made
        total = round(made + left + self._needed.crops_expected)
        notes = [f"{counted(self.views_made, 'crop')} cut"] if self._targets and self.views_made else []
        notes += [f"{self._skipped} skipped"] if self._skipped else []
        self._progress.expect(total, estimated=self._needed.source_left > 0)
        self._progress.advance(items, num_bytes, ", ".join(filter(None, [*notes, bottleneck_text(self.shares)])))


def bottleneck_text(shares: dict[str, float]) -> str:
    """Name the slowest stage in a user's words: coding and writing are one thing to him."""
    last = "coding and writing"
    merged = {name: share for name, share in shares.items() if name not in (CODING, WRITING)}
    if CODING in shares:
        merged[last] = max(shares[CODING], shares.get(WRITING, 0.0))
    return bottleneck(merged, BASE)
