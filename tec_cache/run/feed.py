"""Batches on the device before they are needed: on a GPU the copies run on a stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Protocol, Self, TypeVar

import torch

AHEAD = 2
"""Batches that are copied, or being copied, beside the one in use."""


class Copied(Protocol):
    """A batch, as far as it is fed."""

    def to(self, device: torch.device) -> Self:
        """Return the same batch on a device; copies from pinned memory do not wait."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all that lies on the batch's device."""


B = TypeVar("B", bound=Copied)


def on_device(batches: Generator[B, None, None], device: torch.device) -> Generator[B, None, None]:
    """Yield the batches on the device; on a CPU they are there already.

    The host never waits for a copy, and the device for none but the first: batches of pinned memory are copied
    while the device works on the ones before.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    copied: deque[tuple[B, torch.cuda.Event]] = deque()
    with closing(batches):
        for batch in batches:
            with torch.cuda.stream(stream):
                copied.append((batch.to(device), stream.record_event()))
            if len(copied) > AHEAD:
                yield _arrived(*copied.popleft(), device)
        while copied:
            yield _arrived(*copied.popleft(), device)


def _arrived(batch: B, event: torch.cuda.Event, device: torch.device) -> B:
    """Let the device's work wait for a copy, and the memory be given back only after that work."""
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for tensor in batch.tensors():
        tensor.record_stream(current)
    return batch
