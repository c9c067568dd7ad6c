"""Crops through the base: decoded pixels in, normalized targets out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch

from pipelines.extraction.prepare_targets import TargetJob
from tec_cache.background import Channel
from tec_cache.cache.layout import Unit
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import ViewsRecord
from tec_cache.data.image_pool import ImagePool
from tec_cache.errors import NonFiniteError
from tec_cache.memory import explained_memory
from tec_cache.pixels import normalized
from tec_cache.printable import counted
from tec_cache.targets import normalize_targets
from tec_cache.types import Targets

T = TypeVar("T")

VIEWS_AHEAD = 512
"""Stored crops that are decoded ahead of the base, but one batch at least: 77 MB of pixels at 224 pixels."""

CROPS_TOGETHER = 16
"""Crops that are decoded as one task: what a task costs beside its work is then hardly seen."""


class Places:
    """Memory for the pixels of some batches, used again and again: a batch takes a place, and gives it back.

    check: raises where nobody waits for a place any longer.
    """

    def __init__(self, job: TargetJob, pool: ImagePool, count: int, check: Callable[[], None] = lambda: None) -> None:
        self.pool, self.size = pool, job.batch_size
        self._memory = pool.pixels(count * self.size, job.base.input_size)
        self._pixels = torch.from_numpy(self._memory.array)
        self._free: Channel[int] = Channel(count, check)
        for place in range(count):
            self._free.put(place)

    def take(self, crops: Sequence[bytes]) -> tuple[torch.Tensor, list[Future[None]], Callable[[], None]]:
        """Wait for a free place and begin to decode crops to it; return it, what to await, and how to return it."""
        place = next(self._free)
        first = place * self.size
        decoding = [
            self.pool.decode(crops[at : at + CROPS_TOGETHER], self._memory, first + at)
            for at in range(0, len(crops), CROPS_TOGETHER)
        ]
        return self._pixels[first : first + len(crops)], decoding, lambda: self._free.put(place)


@dataclass(frozen=True)
class Batch:
    """Some crops on their way to the base: a pool decodes them."""

    keys: Sequence[str]
    where: str
    """What they are part of, for messages."""
    pixels: torch.Tensor
    """(B, S, S, 3) uint8, whole when all of `decoding` is done, and until `done` is called."""
    decoding: list[Future[None]]
    done: Callable[[], None]
    """To be called once the base was given the pixels: another batch is decoded in their place."""

    def decoded(self) -> torch.Tensor:
        """Wait until all is decoded; return the pixels. Raises what decoding raises."""
        for future in self.decoding:
            future.result()
        return self.pixels

    def require_finite(self, targets: Targets) -> None:
        """Raise NonFiniteError, naming the sample, unless all numbers are finite. Waits for the device."""
        finite = torch.isfinite(targets.features).flatten(1).all(1)
        if targets.attention is not None:
            finite &= torch.isfinite(targets.attention).flatten(1).all(1)
        if targets.class_token is not None:
            finite &= torch.isfinite(targets.class_token).all(1)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"the base gives a target that is not finite for {self.keys[bad]!r}",
                where=self.where,
                todo="check the weights; with bfloat16, try --precision float32",
            )


@dataclass(frozen=True)
class UnitBatch:
    """A batch within a unit of views; a batch never crosses a unit."""

    unit: Unit
    views: ViewsRecord
    rows: range
    batch: Batch | None
    """None for a unit without crops, which is one empty batch."""

    @property
    def last(self) -> bool:
        """Whether it ends its unit."""
        return self.rows.stop == len(self.views.keys)


def batches_ahead(job: TargetJob) -> int:
    """Return how many batches are decoded ahead of the base."""
    return max(1, VIEWS_AHEAD // job.batch_size)


def unit_batches(cache: Cache, job: TargetJob, units: Iterable[Unit], places: Places) -> Iterator[UnitBatch]:
    """Read the crops of units and begin to decode them, batch by batch.

    The base sees the decoded stored crops, the very pixels the student will see. Crops are read in pieces of several
    batches: from an object store each piece is a round trip.
    """
    piece = batches_ahead(job) * job.batch_size
    for unit in units:
        views = cache.views_record(unit)
        if not views.keys:
            yield UnitBatch(unit, views, range(0), None)
        for begin in range(0, len(views.keys), piece):
            crops = cache.read_crops(views, range(begin, min(begin + piece, len(views.keys))))
            for start in range(begin, begin + len(crops), job.batch_size):
                part = crops[start - begin : start - begin + job.batch_size]
                rows = range(start, start + len(part))
                keys = views.keys[rows.start : rows.stop]
                yield UnitBatch(unit, views, rows, start_batch(part, keys, f"unit {unit}", places))


def targets_of_crops(job: TargetJob, crops: Sequence[bytes], keys: Sequence[str], pool: ImagePool) -> Iterator[Targets]:
    """Yield the targets of some stored crops, batch by batch, all of them finite."""
    places = Places(job, pool, 2)

    def begin(start: int) -> Batch:
        part = slice(start, start + job.batch_size)
        return start_batch(crops[part], keys[part], "a sample of the views", places)

    for batch in one_ahead(begin, range(0, len(crops), job.batch_size)):
        targets = targets_of(job, batch.decoded())
        batch.done()
        batch.require_finite(targets)
        yield targets


def start_batch(crops: Sequence[bytes], keys: Sequence[str], where: str, places: Places) -> Batch:
    """Begin to decode crops, as soon as there is a place for them."""
    return Batch(keys, where, *places.take(crops))


def targets_of(job: TargetJob, pixels: torch.Tensor) -> Targets:
    """Run the base on pixels (B, S, S, 3) uint8 and normalize its features; nobody looks whether they are finite.

    On a GPU nothing here waits for the device: the work is queued behind that of the batch before. The pixels are not
    needed any more when this returns: a GPU copies from pinned memory of torch's. Raises TecCacheError where memory
    does not suffice.
    """
    device, count = job.compute.device, len(pixels)
    todo = f"give --batch-size {count // 2}" if count > 1 else "use a GPU with more memory, or --device cpu"
    with explained_memory(lambda: f"the base on {counted(count, 'view')} at once", str(device), lambda: todo):
        if device.type == "cuda":
            pixels = pixels.pin_memory()
        images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
        images = normalized(images, job.base.mean, job.base.std)
        with job.compute.autocast():
            raw = job.base(images)
        return normalize_targets(raw, job.spec.normalization)


def one_ahead(start: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    """Start each item one step before it is needed, so that decoding overlaps the base."""
    waiting: list[T] = []
    for item in items:
        waiting.append(start(item))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
