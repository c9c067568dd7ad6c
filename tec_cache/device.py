"""Device, precision and threads: resolved once, stated and recorded."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from tec_cache.errors import ConfigError

MOST_WORKERS = 16
"""More threads than that wait for each other's turn at the interpreter."""

MOST_IMAGE_WORKERS = 32
"""Of one process in stage one: what they make keeps its interpreter busy."""


@dataclass(frozen=True)
class Compute:
    """Where and in which precision to compute."""

    device: torch.device
    precision: str
    """float32, without TF32 in products or convolutions, or bfloat16 (autocast)."""

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast for bfloat16, nothing for float32."""
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


class Stopwatch:
    """Seconds that a device works on what is given to it within the block.

    A GPU takes work and does it later: nobody waits for it before `seconds` is asked, which any thread may do.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times: list[float] = []

    def __enter__(self) -> Stopwatch:
        self._mark(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._mark(1)

    def _mark(self, place: int) -> None:
        if self._events:
            self._events[place].record()
        self._times.append(time.perf_counter())

    def seconds(self) -> float:
        """Wait until the work is done; return how long the device took."""
        if self._events:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._times[1] - self._times[0]


def resolve_compute(device: str, precision: str, local_rank: int = 0, *, shared: bool = False) -> Compute:
    """Turn "auto" into a GPU with bfloat16 where there is one, else the CPU with float32.

    shared: where a machine has more processes than GPUs, deal the GPUs out among them; nccl refuses two on one GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank % max(1, torch.cuda.device_count()) if shared else local_rank}"
    if device != "cpu" and not device.startswith("cuda:"):
        raise ConfigError(f"unknown device {device!r}", todo="one of: auto, cpu, cuda, cuda:N")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError("no GPU is visible to torch", where=f"--device {device}", todo="use --device cpu")
        torch.cuda.set_device(torch.device(device))
    if precision == "auto":
        precision = "bfloat16" if device.startswith("cuda") else "float32"
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"unknown precision {precision!r}", todo="one of: auto, float32, bfloat16")
    if precision == "float32":
        _compute_float32_exactly()
    return Compute(torch.device(device), precision)


def _compute_float32_exactly() -> None:
    """Let no product of float32 be rounded to TF32's ten bits: torch does so in convolutions unless told otherwise."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Give a thread's work on a GPU a stream of its own, so that it waits for no other thread's; nothing on a CPU.

    The thread is told its device first: it begins with device 0, and would return to that at the end of the block.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def device_notes(device: torch.device) -> dict[str, str]:
    """Return what numbers depend on beside the settings: a GPU's model, and the libraries that compute on it."""
    if device.type != "cuda":
        return {}
    return {
        "gpu": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def default_threads(world_size: int) -> int:
    """Return torch's threads on a CPU: OMP_NUM_THREADS where the user set it, else all cores.

    torchrun sets OMP_NUM_THREADS itself, so with several processes it says nothing of the user's wish.
    """
    wish = os.environ.get("OMP_NUM_THREADS", "")
    return int(wish) if wish.isdigit() and int(wish) > 0 and world_size == 1 else available_cores()


def default_workers(device: torch.device, processes: int) -> int:
    """Return the threads that read for one of several processes on a machine.

    Beside a GPU all its share of the cores; on a CPU, where the training itself takes the cores, one.
    """
    return max(1, min(MOST_WORKERS, available_cores() // processes)) if device.type == "cuda" else 1


def default_image_workers(processes: int) -> int:
    """Return how many images one of several processes on a machine works on at a time: its share of the cores."""
    return max(1, min(MOST_IMAGE_WORKERS, available_cores() // processes))


def available_cores() -> int:
    """Return the cores this process may use; the same number in every rank of one machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
