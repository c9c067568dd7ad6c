"""Progress on stderr: a bar on a terminal, a plain line now and then in a log, nothing when quiet."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any

from tec_cache.printable import plural, printable

LINE_SECONDS = 15.0
"""Between two plain lines."""

RATE_SECONDS = 30.0
"""Length of the interval that the shown speed and the time left are of: a mean since the start hides a slow-down."""

WIDE = 120
"""Columns of a terminal that has room for a long bar."""


class Progress:
    """Counts items of one stage: items per second, bytes, time left, and whatever else is told.

    noun: what one item is. Any thread may count.
    """

    def __init__(self, title: str, *, total: int | None = None, noun: str = "view", quiet: bool = False) -> None:
        self.title, self.total, self.noun, self.quiet = title, total, noun, quiet
        self.done, self.bytes = 0, 0
        self.estimated = False
        """Whether `total` is a guess."""
        self._lock = threading.RLock()
        self._note = ""
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        self._first = 0
        self._marks: deque[tuple[float, int]] = deque([(self._start, 0)])
        """Moments of the last RATE_SECONDS, a second apart at least, with the items that were done."""

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        self._marks = deque([(self._start, self.done)])
        if not self.quiet and sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24 if console.width >= WIDE else 8),
                TextColumn("{task.fields[text]}", markup=False),
            ]
            self._bar = Bar(*columns, console=console, transient=True)
            self._task = self._bar.add_task(printable(self.title), total=self.total, text="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if not self.quiet and self.done:
            self._print(final=True)

    def start_at(self, done: int) -> None:
        """Begin at a number of items that an earlier run has done; they do not count for the rate."""
        self.done = self._first = done
        self._marks = deque([(time.monotonic(), done)])

    def expect(self, total: int, *, estimated: bool = False) -> None:
        """Say how many items there will be, where that was not known at the beginning."""
        with self._lock:
            self.total, self.estimated = total, estimated

    def advance(self, items: int, num_bytes: int = 0, note: str = "") -> None:
        """Count finished items and written bytes; `note` replaces the last one."""
        with self._lock:
            self.done += items
            self.bytes += num_bytes
            self._note = note
            if self.quiet:
                return
            self._mark(time.monotonic())
            if self._bar is not None:
                self._bar.update(self._task, completed=self.done, total=self.total, text=printable(self._text()))
            elif time.monotonic() - self._last_line >= LINE_SECONDS:
                self._print()

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self.quiet:
            return
        with self._lock:
            line = printable(f"{self.title}: {text}")
            if self._bar is not None:
                self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)

    @property
    def rate(self) -> float:
        """Items per second over the last RATE_SECONDS; since the beginning where that is less."""
        with self._lock:
            then, done = self._marks[0]
            return (self.done - done) / max(time.monotonic() - then, 1e-9)

    @property
    def mean_rate(self) -> float:
        """Items per second of this call as a whole."""
        return (self.done - self._first) / max(self.seconds, 1e-9)

    def _mark(self, now: float) -> None:
        """Remember how far the work is, and forget what is too long ago: one mark is that old."""
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self.done))
        while len(self._marks) > 1 and now - self._marks[1][0] >= RATE_SECONDS:
            self._marks.popleft()

    def _text(self, final: bool = False) -> str:
        of = f"/{'~' * self.estimated}{self.total:,}" if self.total else ""
        noun, rate = plural(self.total or self.done, self.noun), self.mean_rate if final else self.rate
        parts = [f"{self.done:,}{of} {noun}", f"{rate:,.1f}/s"]
        # what a narrow terminal cuts off comes last
        if final:
            parts.append(f"in {human_seconds(self.seconds)}")
        elif self.total and self.rate > 0 and self.total >= self.done:
            parts.append(f"{human_seconds((self.total - self.done) / self.rate)} left")
        if self.bytes:
            parts.append(human_bytes(self.bytes))
        if self._note:
            parts.append(self._note)
        return ", ".join(parts)

    def _print(self, final: bool = False) -> None:
        self._last_line = time.monotonic()
        print(printable(f"{self.title}: {self._text(final)}"), file=sys.stderr, flush=True)


def human_bytes(count: float) -> str:
    """Write a number of bytes for people, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_seconds(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
