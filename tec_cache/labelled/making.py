"""How a batch is made of its photos, in whatever process: read, decoded, transformed with a seed of each photo."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import default_collate

from tec_cache.errors import ConfigError, SourceError, TecCacheError
from tec_cache.labelled.batch import LabelledBatch
from tec_cache.labelled.index import PhotoIndex, broken_photo
from tec_cache.rng import bits, key64

Example = tuple[torch.Tensor, torch.Tensor]
"""A photo's pixels, and what is to be learned of it."""
STOP, STAND_IN, LEAVE_OUT = "stop", "stand in", "leave out"
"""What a broken photo does: raise SourceError, let the next whole one of its step stand in, or be missing."""


class Wanted(NamedTuple):
    """A batch to be made: some of the photos of a step, over all ranks."""

    epoch: int
    numbers: npt.NDArray[np.int64]
    """Of the step's photos in the index."""
    start: int
    stop: int
    """Which of them."""


class Made(NamedTuple):
    """A batch, or why there is none."""

    batch: LabelledBatch | None = None
    """None where every photo is left out."""
    damaged: tuple[str, ...] = ()
    """Broken photos, each with its shard and what is wrong."""
    error: TecCacheError | None = None


@dataclass
class Maker:
    """Makes batches: a data set of torch's, whose samples are whole batches. Errors of ours are returned as values."""

    index: PhotoIndex
    transform: Any
    """What `index.example` takes."""
    seed: int
    broken: str
    """STOP, STAND_IN or LEAVE_OUT."""
    stop: Any = None
    """Flag in memory that processes share; once its value is not 0, nobody wants batches any more."""

    def __getitem__(self, wanted: Wanted) -> Made:
        try:
            return self._make(wanted)
        except TecCacheError as error:
            return Made(error=error)

    def _make(self, wanted: Wanted) -> Made:
        damaged: dict[int, str] = {}
        images: dict[int, Example] = {}
        places = []
        for place in range(wanted.start, wanted.stop):
            if self.stop is not None and self.stop.value:
                return Made()
            places.append(self._whole(wanted, place, images, damaged))
        chosen = [place for place in places if place is not None]
        if not chosen:
            return Made(None, tuple(damaged.values()))
        numbers = wanted.numbers[chosen]
        shapes = {tuple(images[place][0].shape) for place in chosen}
        if len(shapes) > 1:
            what = f"the transform gives images of different shapes: {', '.join(map(str, sorted(shapes)))}"
            raise ConfigError(what, todo="let it cut squares of one size")
        # in a worker process it stacks them into memory that the main process shares
        stacked, labels = default_collate([images[place] for place in chosen])
        return Made(LabelledBatch(stacked, labels, wanted.epoch, numbers), tuple(damaged.values()))

    def _whole(self, wanted: Wanted, place: int, images: dict[int, Example], damaged: dict[int, str]) -> int | None:
        """Return the place of a photo that is whole: this one, or the next of the step that may stand in for it.

        Where others begin and end, in ranks and in micro-batches, makes no difference.
        """
        count = len(wanted.numbers) if self.broken == STAND_IN else 1
        for other in ((place + i) % len(wanted.numbers) for i in range(count)):
            if other in damaged:
                continue
            if other in images:
                return other
            number = int(wanted.numbers[other])
            try:
                images[other] = self._example(number, wanted.epoch)
            except SourceError as error:
                if self.broken == STOP:
                    raise broken_photo(self.index.key(number), error.what, self.index.place(number)) from error
                damaged[other] = f"{self.index.place(number)}: photo {self.index.key(number)!r}: {error.what}"
            else:
                return other
        if self.broken == STAND_IN:
            todo = "is this the source that was meant? mend its photos"
            where = self.index.place(int(wanted.numbers[place]))
            raise SourceError(f"every photo of a step is broken; one: {damaged[place]}", where=where, todo=todo)
        return None

    def _example(self, number: int, epoch: int) -> Example:
        """Make one photo's tensors, a function of (seed, epoch, photo). Raises SourceError where it is not whole."""
        seed_generators(key64("augment", self.seed, epoch, int(self.index.sample_keys[number])))
        image, target = self.index.example(number, self.transform)
        if not (isinstance(image, torch.Tensor) and image.dtype == torch.float32 and image.ndim == 3):
            kind = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise ConfigError(f"the transform gives {kind}", todo="let it end in a float32 tensor (3, S, S)")
        return image, target


def seed_generators(key: int) -> None:
    """Set Python's, numpy's and torch's (CPU) global generators by a 64-bit key.

    Each by a key of its own: Python's and numpy's are the same generator, and by the same key would draw the same.
    """
    python, numpy, torchs = map(int, bits(key, 3))
    random.seed(python)
    np.random.seed([numpy & 0xFFFFFFFF, numpy >> 32])
    torch.default_generator.manual_seed(torchs)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global generators back at the end of the block as they were at its beginning."""
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torchs)
