"""Crops through the base: decoded pixels in, normalized finite targets out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from pipelines.prepare import TargetJob
from tec_cache.cache.layout import Unit
from tec_cache.cache.pixels import decode_crop, resize
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import ViewsRecord
from tec_cache.errors import NonFiniteError
from tec_cache.targets import normalize_targets
from tec_cache.types import Targets

T = TypeVar("T")


def base_targets(
    cache: Cache, job: TargetJob, unit: Unit, views: ViewsRecord, pool: ThreadPoolExecutor
) -> Iterator[tuple[range, Targets]]:
    """Yield (rows, targets) of one unit; a batch never crosses a unit, and rows of one batch are read in one piece.

    The base sees the decoded stored crops, the very pixels the student will see.
    """

    def submit(start: int) -> tuple[range, list[Future[Any]]]:
        rows = range(start, min(start + job.batch_size, len(views.keys)))
        return rows, [pool.submit(_pixels, crop, job.base.input_size) for crop in cache.read_crops(views, rows)]

    for rows, futures in one_ahead(submit, range(0, len(views.keys), job.batch_size)):
        pixels = np.stack([future.result() for future in futures])
        yield rows, targets_of(job, pixels, [views.keys[row] for row in rows], f"unit {unit}")


def targets_of_crops(
    job: TargetJob, crops: Sequence[bytes], keys: Sequence[str], pool: ThreadPoolExecutor
) -> Iterator[Targets]:
    """Yield the targets of some stored crops, batch by batch."""

    def submit(start: int) -> tuple[int, list[Future[Any]]]:
        part = crops[start : start + job.batch_size]
        return start, [pool.submit(_pixels, crop, job.base.input_size) for crop in part]

    for start, futures in one_ahead(submit, range(0, len(crops), job.batch_size)):
        pixels = np.stack([future.result() for future in futures])
        yield targets_of(job, pixels, keys[start : start + len(pixels)], "a sample of the views")


def targets_of(job: TargetJob, pixels: np.ndarray[Any, np.dtype[np.uint8]], keys: Sequence[str], where: str) -> Targets:
    """Run the base on pixels (B, S, S, 3), normalize its features, and check that every number is finite."""
    device = job.compute.device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (job.base.mean, job.base.std))
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
    with job.compute.autocast():
        raw = job.base(images)
    targets = normalize_targets(raw, job.spec.normalization)
    finite = torch.isfinite(targets.features).flatten(1).all(1)
    if targets.attention is not None:
        finite &= torch.isfinite(targets.attention).flatten(1).all(1)
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"the base gives a target that is not finite for {keys[bad]!r}",
            where=where,
            todo="check the weights; with bfloat16, try --precision float32",
        )
    return targets


def one_ahead(start: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    """Start each item one step before it is needed, so that decoding overlaps the base."""
    waiting: list[T] = []
    for item in items:
        waiting.append(start(item))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _pixels(crop: bytes, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return resize(decode_crop(crop), size)
