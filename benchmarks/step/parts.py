"""Where a training step's time goes: its functions, timed one by one with the device waited for."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.training.target_sources import OnlineTargets
from tec_cache.loader import Batch
from tec_cache.run import loop as loop_module
from tec_cache.run.loop import Loop
from tec_cache.student.heads import attention as attention_module
from tec_cache.student.heads import feature as feature_module
from tec_cache.tasks.pretrain import MaskedBatch, Pretrain

STEPS = 4


class _Clock:
    """Seconds by part; a part within another one is taken off that one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._now()
        self._inner.append(0.0)
        yield
        whole = self._now() - begin
        self.seconds[name] += whole - self._inner.pop()
        self._inner[-1] += whole

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def parts_of_a_step(task: Pretrain, loop: Loop[MaskedBatch], step: Callable[[], None]) -> dict[str, float]:
    """Return the share of each part of a step; `step` does one."""
    clock, student = _Clock(loop.compute.device), task.student
    (source,) = task.sources.values()
    targets = "base in the loop" if isinstance(source, OnlineTargets) else "decoding targets"
    places: list[tuple[Any, str, str]] = [
        (loop, "next_batch", "waiting for the loader"),
        (Batch, "images", "pixels to images"),
        (source, "targets", targets),
        (student, "embed_visible", "patch embedding"),
        (student, "forward_layers", "encoder"),
        (student.decoder, "forward", "decoder"),
        (feature_module, "feature_loss", "losses"),
        (attention_module, "attention_loss", "losses"),
        (torch.Tensor, "backward", "backward"),
        (loop_module, "gradient_norm", "gradient norm"),
        (loop.optimizer, "step", "optimizer"),
    ]
    places += [(adapters, "forward", "encoder adapters") for adapters in student.encoder_adapters]
    with ExitStack() as patches:
        for owner, name, part in places:
            patches.enter_context(mock.patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        step()
        clock.seconds.clear()
        for _ in range(STEPS):
            with clock.part("all else"):
                step()
    whole = sum(clock.seconds.values())
    return {name: spent / whole for name, spent in sorted(clock.seconds.items(), key=lambda item: -item[1])}


def plain_base_seconds(task: Pretrain, batch: int) -> float:
    """Return the seconds of the online base's forward pass with attention as plain products and a softmax."""
    (source,) = task.sources.values()
    assert isinstance(source, OnlineTargets)
    images = torch.randn(batch, 3, source.base.input_size, source.base.input_size)
    seconds = []
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(4):
            begin = time.perf_counter()
            source.base(images)
            seconds.append(time.perf_counter() - begin)
    return min(seconds)
