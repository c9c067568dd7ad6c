"""Progress on stderr: a bar on a terminal, a plain line now and then in a log, nothing when quiet."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

from tec_cache.printable import plural, printable

LINE_SECONDS = 15.0
"""Between two plain lines."""


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

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        if not self.quiet and sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
            ]
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
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
            if self._bar is not None:
                self._bar.update(self._task, completed=self.done, total=self.total, text=printable(self._text()))
            elif time.monotonic() - self._last_line >= LINE_SECONDS:
                self._print()

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Items per second of this run."""
        return (self.done - self._first) / max(self.seconds, 1e-9)

    def _text(self, final: bool = False) -> str:
        of = f"/{'~' * self.estimated}{self.total:,}" if self.total else ""
        parts = [f"{self.done:,}{of} {plural(self.total or self.done, self.noun)}", f"{self.rate:,.1f}/s"]
        if self.bytes:
            parts.append(human_bytes(self.bytes))
        if self._note:
            parts.append(self._note)
        if final:
            parts.append(f"in {human_seconds(self.seconds)}")
        elif self.total and self.rate > 0 and self.total >= self.done:
            parts.append(f"{human_seconds((self.total - self.done) / self.rate)} left")
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
