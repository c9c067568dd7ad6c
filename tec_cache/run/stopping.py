"""SIGINT, SIGTERM and SIGUSR1 end a run after the step it is in, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from tec_cache.distributed import Ranks, gloo_group

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; a job's time limit; what many job scripts ask the scheduler to send before it."""


class Agreed(NamedTuple):
    """What all ranks do alike after a step."""

    stop: bool
    """End, with a checkpoint."""
    late: bool
    """Write the next checkpoint that is due: enough minutes have passed."""


class StopRequest:
    """Set by any of `SIGNALS`.

    Several ranks agree on the step after which to stop, or one would wait for the others for ever: each step
    begins to exchange two numbers on the CPU and reads them in the next, when they have long arrived.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.asked = False
        self._group: Any = gloo_group() if ranks.world_size > 1 else None
        self._numbers = torch.zeros(2)
        self._work: Any = None

    def agreed(self, late: bool = False, saved: int = 0) -> Agreed:
        """Say whether the coming step is the last one; every rank calls this once a step.

        late: whether a checkpoint should be written when the next is due, by this rank's clock. saved: how many were,
        the same in all ranks: what was said before the last one counts no more.
        """
        if self._group is None:
            return Agreed(self.asked, late)
        found = Agreed(stop=False, late=False)
        if self._work is not None:
            self._work.wait()
            self._work = None
            asked, number = self._numbers.tolist()
            found = Agreed(asked > 0, number == saved + 1)
            if found.stop:
                return found
        self._numbers = torch.tensor([float(self.asked), float(saved + 1 if late else 0)])
        group, largest = self._group, torch.distributed.ReduceOp.MAX
        self._work = torch.distributed.all_reduce(self._numbers, op=largest, group=group, async_op=True)
        return found

    def finish(self) -> None:
        """Wait for numbers that are still on their way."""
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
