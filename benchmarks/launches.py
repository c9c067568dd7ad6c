"""How much a piece of work asks of a device: operations that torch is asked for, and kernels that a GPU is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute within the block; on a GPU each is a kernel or more. Views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += not func.is_view
        return func(*args, **(kwargs or {}))


def count_operations(work: Callable[[], object]) -> int:
    """Return the operations of some work."""
    with Operations() as seen:
        work()
    return seen.counts.total()


def count_kernels(work: Callable[[], object], device: torch.device) -> int | None:
    """Return the kernels that a GPU runs for some work; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)
