"""SIGINT and SIGTERM end a run after the step it is in, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tec_cache.distributed import Ranks


class StopRequest:
    """Set by SIGINT or SIGTERM; the loop ends after the step it is in."""

    def __init__(self) -> None:
        self.asked = False

    def agreed(self, ranks: Ranks, device: torch.device, *, ask: bool) -> bool:
        """Say whether to stop now. Several ranks agree at the steps that are logged, so none waits for another."""
        if ranks.world_size == 1:
            return self.asked
        if not ask:
            return False
        flag = torch.tensor(float(self.asked), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


@contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request, and a second one into an exception as usual."""
    request = StopRequest()

    def ask(number: int, frame: Any) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs it keeps its own handlers
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
