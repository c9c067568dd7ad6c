"""SIGINT, SIGTERM and SIGUSR1 end a run after the step it is in, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tec_cache.distributed import Ranks, gloo_group

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; a job's time limit; what many job scripts ask the scheduler to send before it."""


class StopRequest:
    """Set by any of `SIGNALS`.

    Several ranks agree on the step after which to stop, or one would wait for the others for ever: each step
    begins to exchange a flag on the CPU and reads it in the next, when it has long arrived.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.asked = False
        self._group: Any = gloo_group() if ranks.world_size > 1 else None
        self._flag = torch.zeros(1)
        self._work: Any = None

    def agreed(self) -> bool:
        """Say whether the coming step is the last one; every rank calls this once a step."""
        if self._group is None:
            return self.asked
        if self._work is not None:
            self._work.wait()
            self._work = None
            if self._flag.item() > 0:
                return True
        self._flag = torch.tensor([float(self.asked)])
        group, largest = self._group, torch.distributed.ReduceOp.MAX
        self._work = torch.distributed.all_reduce(self._flag, op=largest, group=group, async_op=True)
        return False

    def finish(self) -> None:
        """Wait for a flag that is still on its way."""
        if self._work is not None:
            self._work.wait()


@contextmanager
def stop_requested(ranks: Ranks) -> Iterator[StopRequest]:
    """Turn signals into a request to stop, and a second SIGINT, of somebody who will not wait, into an exception.

    A second SIGTERM says nothing new: a scheduler signals every process of a job, and torchrun passes on its own.
    """
    request = StopRequest(ranks)

    def ask(number: int, frame: Any) -> None:
        if request.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.asked = True

    try:
        before = {number: signal.signal(number, ask) for number in SIGNALS}
    except ValueError:  # not in the main thread: whoever runs it keeps its own handlers
        yield request
        return
    try:
        yield request
        request.finish()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
