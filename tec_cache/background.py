"""Stages of one job that work at the same time, each in a thread of its own, joined by bounded queues.

The first error of any stage, or Ctrl-C, stops all others, and is the error that whoever started them sees. A stage
that waits for its queue notices by itself; one that works for long between two queues asks `Stages.check`.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

LOOK_SECONDS = 0.1
"""Between two looks of a waiting stage whether the others have been stopped."""

_END: Any = object()


class Stopped(Exception):
    """Another stage has failed, or the job was given up. Never leaves the block of `Stages`."""


class Stages:
    """Threads for the length of a block; the body of the block is a stage as well, in the caller's thread.

    At the end of the block all threads are waited for: what they have in hand is finished, nothing more is begun
    once one has failed. The body must take all that comes from `ahead`, and end the channels it has filled.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._fail(error)
        try:
            self._join()
        except BaseException as interrupt:  # Ctrl-C while the last stages finish
            self._fail(interrupt)
            self._join()
        if self._error is not None and self._error is not error:
            raise self._error

    def start(self, work: Callable[..., object], *args: Any) -> None:
        """Run `work(*args)` in a thread."""
        thread = threading.Thread(target=self._run, args=(work, args), name=getattr(work, "__name__", "stage"))
        self._threads.append(thread)
        thread.start()

    def channel(self, most: int) -> Channel[Any]:
        """Make a queue of at most `most` items between two stages."""
        return Channel(most, self.check)

    def ahead(self, items: Iterable[T], most: int) -> Iterator[T]:
        """Iterate in a thread, at most `most` finished items ahead of the consumer, and one more in work."""
        channel: Channel[T] = self.channel(most)

        def fill() -> None:
            for item in items:
                channel.put(item)
            channel.end()

        fill.__name__ = getattr(items, "__name__", "ahead")  # a generator's: the thread is called by what it does
        self.start(fill)
        return channel

    def check(self) -> None:
        """Raise Stopped where another stage has failed."""
        if self._stop.is_set():
            raise Stopped

    def _run(self, work: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            work(*args)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None and not isinstance(error, Stopped):
                self._error = error
        self._stop.set()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()


class Channel(Generic[T], Iterator[T]):
    """A bounded queue with an end; `Stages.channel` makes one. Both ends raise Stopped once a stage has failed."""

    def __init__(self, most: int, check: Callable[[], None]) -> None:
        self._queue: queue.Queue[T] = queue.Queue(most)
        self._check = check

    def put(self, item: T) -> None:
        """Wait for room and add an item."""
        while True:
            self._check()
            try:
                return self._queue.put(item, timeout=LOOK_SECONDS)
            except queue.Full:
                continue

    def end(self) -> None:
        """Say that nothing more comes."""
        self.put(_END)

    def __next__(self) -> T:
        while True:
            self._check()
            try:
                item = self._queue.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            if item is _END:
                self._queue.put(item)  # for the other consumers
                raise StopIteration
            return item


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """Yield `function(item)` of each item, in order, at most `most` of them begun in the pool and not yet taken.

    Unlike `pool.map`, it leaves the pool free for others' tasks between its own.
    """
    for _, result in begun_in_order(lambda item: pool.submit(function, item), items, most):
        yield result


def begun_in_order(begin: Callable[[T], Future[R]], items: Iterable[T], most: int) -> Iterator[tuple[T, R]]:
    """Yield each item with the result of what was begun for it, in order, at most `most` of them begun ahead."""
    begun: deque[tuple[T, Future[R]]] = deque()

    def first() -> tuple[T, R]:
        item, future = begun.popleft()
        return item, future.result()

    try:
        for item in items:
            begun.append((item, begin(item)))
            if len(begun) == most:
                yield first()
        while begun:
            yield first()
    finally:
        for _, future in begun:
            future.cancel()
