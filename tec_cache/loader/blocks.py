"""Blocks in memory: each is read once, however many batches and threads want its rows."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from threading import Lock

from tec_cache.loader.units import Block, Units

Name = tuple[int, int]
"""Which block: the number of its unit, and its own within."""


class BlockCache:
    """The blocks of the batches that are being loaded, and the `keep` that were used last.

    A buffer of shuffled blocks is asked for again and again until its rows are used up; with `keep` blocks of one
    buffer none is read twice.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._blocks: OrderedDict[Name, Future[Block]] = OrderedDict()
        self._holders: Counter[Name] = Counter()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._blocks)

    def hold(self, names: Iterable[Name]) -> None:
        """Keep the blocks of a batch from now until it is loaded."""
        with self._lock:
            self._holders.update(names)

    def release(self, names: Iterable[Name]) -> None:
        """Let go of a batch's blocks."""
        with self._lock:
            self._holders.subtract(names)
            for name in names:
                if not self._holders[name]:
                    del self._holders[name]
            idle = [name for name in self._blocks if name not in self._holders]
            for name in idle[: max(0, len(idle) - self.keep)]:
                del self._blocks[name]

    def get(self, units: Units, name: Name) -> Block:
        """Return a block, reading it if nobody has; who asks meanwhile waits for it. Raises CacheError."""
        unit, number = name
        with self._lock:
            future = self._blocks.get(name)
            mine = future is None
            if future is None:
                future = self._blocks[name] = Future()
            else:
                self._blocks.move_to_end(name)
        if mine:
            try:
                future.set_result(units.get(unit).block(number))
            except BaseException as error:
                future.set_exception(error)
        return future.result()
