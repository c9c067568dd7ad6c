"""Which stage of a pipeline is the bottleneck: the one that is at work all the time while the others wait."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Busy:
    """Seconds that the stages of a pipeline were at work since this was made; the rest of the time they waited.

    width: how many threads a stage has, where it has more than one.
    """

    def __init__(self, width: Mapping[str, int] | None = None) -> None:
        self._width = dict(width or {})
        self._begin = time.perf_counter()
        self._seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds of work."""
        with self._lock:
            self._seconds[stage] += seconds  # type: ignore[assignment]

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """Count the seconds of the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - begin)

    def each(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """Count the seconds in which an iterator makes its items, not those in which they are used."""
        iterator = iter(items)
        while True:
            with self.at(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @property
    def seconds(self) -> float:
        """Seconds since this was made."""
        return time.perf_counter() - self._begin

    @property
    def shares(self) -> dict[str, float]:
        """Share of the time that each stage was at work, 0 to 1."""
        elapsed = max(self.seconds, 1e-9)
        with self._lock:
            seconds = dict(self._seconds)
        return {name: min(1.0, value / self._width.get(name, 1) / elapsed) for name, value in seconds.items()}


class TimedPool(ThreadPoolExecutor):
    """A pool that counts the seconds of its tasks, for a stage of whoever watches it."""

    def __init__(self, workers: int, name: str) -> None:
        super().__init__(workers, thread_name_prefix=name)
        self.workers = workers
        self.watch: Callable[[float], None] | None = None

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Begin a task."""
        return super().submit(self._timed, fn, *args, **kwargs)

    def _timed(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        begin = time.perf_counter()
        try:
            return fn(*args, **kwargs)
        finally:
            if self.watch is not None:
                self.watch(time.perf_counter() - begin)


def bottleneck(shares: Mapping[str, float], base: str) -> str:
    """Name the stage that waits least, and how much of the time the base, whose device is the dear one, waited."""
    if not shares:
        return ""
    slowest = max(shares, key=shares.__getitem__)
    text = f"{slowest} is the bottleneck"
    if base not in shares:
        return text
    return f"{text} ({'it' if slowest == base else base} waited {1 - shares[base]:.0%} of the time)".replace("%", " %")
