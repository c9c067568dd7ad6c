"""Checkpoints that are written while the training goes on: copied at one moment, written by a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tec_cache.distributed import in_group
from tec_cache.pinned import PinnedSlabs
from tec_cache.run.checkpoint import save_checkpoint

LAST_WRITE = 20.0
"""Seconds that a training which has failed gives the checkpoint that is being written: it is a good one, and takes a
few, unless the disk or the device hangs."""


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread; at the end of the block the last one is written.

    After an error it is finished too, for at most `LAST_WRITE` seconds where other ranks wait for this one. After
    Ctrl-C it is given up: then nothing of it stays, and the one before it is whole. Where one cannot be written,
    whoever saves or asks next gets the TecCacheError.
    """

    def __init__(self, run: Path, identity: str) -> None:
        self._run, self._identity = run, identity
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._given_up = threading.Event()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            return
        if self._thread is not None:
            if isinstance(error, Exception):
                self._thread.join(LAST_WRITE if in_group() else None)
            self._given_up.set()
            self._thread.join(LAST_WRITE)  # what is given up ends as soon as the disk answers

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy the state of a finished step and begin to write it; the state may change as soon as this returns.

        On a GPU nothing here waits for the device: the copies are queued behind the step, and in front of whatever
        changes the state next, which they hold up for as long as the bytes travel.
        Waits for a checkpoint that is still being written, and raises its error.
        """
        self.wait()
        copied, arrived = self._copy.of(state)
        self._thread = threading.Thread(
            target=self._write, args=(step, copied, arrived), name="checkpoint", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written; wait for none."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises TecCacheError where that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, state: dict[str, Any], arrived: Callable[[], object]) -> None:
        try:
            arrived()
            save_checkpoint(self._run, self._identity, step, state, given_up=self._given_up.is_set)
        except BaseException as error:
            self._error = error


class HostCopy:
    """Copies nested dictionaries of tensors to host memory, always the same; pinned for what lies on a GPU."""

    def __init__(self) -> None:
        self._slabs = PinnedSlabs()
        self._places: dict[tuple[str, ...], _Place] = {}

    def of(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], object]]:
        """Return a copy, and what waits until it is there. The next call overwrites it."""
        devices: set[torch.device] = set()
        copied = self._mapped(state, (), devices)
        events = {device: torch.cuda.current_stream(device).record_event() for device in devices}

        def arrived() -> None:
            for device, event in events.items():
                torch.cuda.set_device(device)  # this thread's, which begins with another
                event.synchronize()

        return copied, arrived

    def _mapped(self, value: Any, path: tuple[str, ...], devices: set[torch.device]) -> Any:
        if isinstance(value, Mapping):
            return {name: self._mapped(item, (*path, name), devices) for name, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        if value.is_cuda:
            devices.add(value.device)
        place = self._places.get(path)
        if place is None or not place.fits(value):
            place = self._places[path] = _Place(value, self._slabs)
        place.target.copy_(value.detach(), non_blocking=True)
        return place.kept


class _Place:
    """Where one tensor is copied to.

    kept: the same memory as a tensor of its own, since `torch.save` writes all of the storage behind a tensor.
    """

    def __init__(self, value: Tensor, slabs: PinnedSlabs) -> None:
        if not value.is_cuda or not value.numel():
            self.target = self.kept = torch.empty(value.shape, dtype=value.dtype)
            return
        memory = slabs.empty((value.numel() * value.element_size(),), torch.uint8)
        self.kept = torch.frombuffer(memory.numpy(), dtype=value.dtype).view(value.shape)
        self.target = memory.view(value.dtype).view(value.shape)

    def fits(self, value: Tensor) -> bool:
        return self.target.shape == value.shape and self.target.dtype == value.dtype
