"""Features that a frozen model makes of labelled images, and how good they are: the one way in which probes judge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from pipelines.judging.probe_inputs import Numbering, Part, no_label, number_classes, open_part
from tec_cache.base.model import FrozenBase
from tec_cache.cache.pixels import decode_crop, resize
from tec_cache.config import ProbeConfig
from tec_cache.data.images import decode_photo
from tec_cache.data.photos import Photo
from tec_cache.data.views import ViewPlan
from tec_cache.device import Compute, available_cores
from tec_cache.errors import ConfigError, SourceError
from tec_cache.pixels import normalized
from tec_cache.probe.knn import knn_accuracy
from tec_cache.probe.linear import LinearResult, linear_accuracy
from tec_cache.progress import Progress
from tec_cache.urls import without_secrets

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass
class Tally:
    """What of one part's images is not as it should be."""

    left_out: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)


@dataclass
class Features:
    """What a model makes of one part's images."""

    values: torch.Tensor
    """(N, C) float32 on the device, after the final LayerNorm: the mean of the patch tokens, or the class token."""
    labels: torch.Tensor
    """(N,) int64, classes of the probe."""
    tally: Tally


class Scores(NamedTuple):
    """What both probes found; accuracies from 0 to 1."""

    knn: float
    linear: LinearResult


@dataclass(frozen=True)
class Inputs:
    """What the probes learn from and are judged on, under one numbering of classes."""

    parts: tuple[Part, Part]
    numberings: tuple[Numbering, Numbering]
    remark: str
    """What was assumed of the classes; empty where nothing was."""

    @classmethod
    def opened(cls, config: ProbeConfig) -> Inputs:
        """Open both. Raises SourceError, and ConfigError where their classes do not agree."""
        parts = open_part(config.train), open_part(config.test)
        train, test, remark = number_classes(*parts)
        return cls(parts, (train, test), remark)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their numbers; None where labels are numbers only."""
        return self.parts[0].classes or self.parts[1].classes

    def checked(self, size: int, config: ProbeConfig, quiet: bool) -> Tally:
        """Decode every image once and look at its label, as `features` will. Raises SourceError and ConfigError."""
        tally = Tally()
        for part, numbering in zip(self.parts, self.numberings, strict=True):
            with closing(images_of(part, numbering, size, config, tally, "check", quiet)) as batches:
                for _ in batches:
                    pass
        return tally

    def features(
        self, model: FrozenBase, config: ProbeConfig, compute: Compute, quiet: bool
    ) -> tuple[Features, Features]:
        """Return a model's features of both parts. Raises SourceError where one has no usable image."""
        parts = zip(self.parts, self.numberings, strict=True)
        train, test = (features_of(model, part, numbering, config, compute, quiet) for part, numbering in parts)
        return train, test


def scores_of(train: Features, test: Features, config: ProbeConfig) -> Scores:
    """Score both probes. Raises NonFiniteError."""
    data = (train.values, train.labels, test.values, test.labels)
    linear = linear_accuracy(*data, l2=config.l2, max_iter=2000)
    return Scores(knn_accuracy(*data, k=config.neighbours), linear)


def features_of(
    model: FrozenBase, part: Part, numbering: Numbering, config: ProbeConfig, compute: Compute, quiet: bool
) -> Features:
    """Return the features and classes of a part's images. Raises SourceError where none is usable."""
    values, labels, tally = [], [], Tally()
    with closing(images_of(part, numbering, model.input_size, config, tally, "features", quiet)) as batches:
        for pixels, classes in batches:
            images = torch.from_numpy(pixels).to(compute.device)
            images = normalized(images.permute(0, 3, 1, 2).float(), model.mean, model.std)
            with torch.no_grad(), compute.autocast():
                tokens: torch.Tensor = model.model.forward_features(images)  # type: ignore[operator]
            pooled = tokens[:, 0] if config.pool == "class" else tokens[:, model.num_prefix :].mean(dim=1)
            values.append(pooled.float())
            labels += classes
    return Features(torch.cat(values), torch.tensor(labels, device=compute.device), tally)


def images_of(
    part: Part, numbering: Numbering, size: int, config: ProbeConfig, tally: Tally, what: str, quiet: bool
) -> Generator[tuple[Pixels, list[int]], None, None]:
    """Yield a part's images in batches of at most `batch_size`: (B, size, size, 3), and their classes.

    tally: takes what is left out or noted. what: is made of them, for the progress. Raises SourceError where no image
    is usable.
    """
    left_out = Counter(map(kind_of, part.left_out_before()))
    used = 0
    with (
        ThreadPoolExecutor(config.workers or available_cores()) as pool,
        Progress(f"{what} of {without_secrets(part.source)}", noun="image", quiet=quiet) as progress,
    ):
        for group in in_groups(labelled_images(part, numbering, size, config), config.batch_size):
            results = list(pool.map(lambda item: item.load(), group))
            left_out.update(kind_of(loaded.problem) for loaded in results if loaded.problem)
            tally.noted.update(kind_of(loaded.note) for loaded in results if loaded.note)
            pixels = [loaded.pixels for loaded in results if loaded.pixels is not None]
            if pixels:
                classes = [i.label for i, loaded in zip(group, results, strict=True) if loaded.pixels is not None]
                yield np.stack(pixels), classes
                used += len(pixels)
                progress.advance(len(pixels))
    tally.left_out += left_out
    if not used:
        why = "".join(f"; {number:,} left out: {kind}" for kind, number in left_out.items())
        raise SourceError(f"there are no usable images{why}", where=without_secrets(part.source))


def kind_of(problem: str) -> str:
    """Return what problems of one kind have in common: no details in brackets or after a colon, no numbers."""
    return re.sub(r" \(.*|[:;].*", "", problem, flags=re.DOTALL).strip()


class Loaded(NamedTuple):
    """An image as the model sees it."""

    pixels: Pixels | None
    """(size, size, 3); None for a photo that is left out."""
    problem: str = ""
    note: str = ""


@dataclass(frozen=True)
class LabelledImage:
    """An image to be loaded by a worker, and its class."""

    photo: Photo
    label: int
    place: str
    size: int
    stored: bool
    on_error: str

    def load(self) -> Loaded:
        """Decode the image and cut its centre, or say why it is left out. Raises SourceError with --on-error stop."""
        try:
            if self.photo.problem:
                raise SourceError(self.photo.problem)
            if self.stored:
                return Loaded(resize(decode_crop(self.photo.data), self.size))
            image, note = decode_photo(self.photo.data)
        except SourceError as error:
            if self.on_error == "skip":
                return Loaded(None, error.what)
            raise SourceError(
                f"photo {self.photo.key!r}: {error.what}",
                where=self.place,
                todo="mend it, or --on-error skip",
            ) from error
        plan = ViewPlan(crop="center", size=self.size)
        return Loaded(plan.cut(image, plan.view("", "", 0, image.width, image.height)), note=note)


def labelled_images(part: Part, numbering: Numbering, size: int, config: ProbeConfig) -> Iterator[LabelledImage]:
    """Yield the labelled images of photos (centre crop) or of a cache (its stored crops of view 0).

    Raises ConfigError for a photo without a label, which --on-error skip leaves out.
    """
    stored = part.cache is not None
    for photo, place in islice(part.images(), config.limit):
        label = -1
        if photo.label is not None:
            label = numbering.of(photo, place)
        elif not photo.problem:
            if config.on_error == "stop":
                raise ConfigError(
                    f"photo {photo.key!r}: {no_label(photo, place)}",
                    where=place,
                    todo="give every photo a label, or leave those without out: --on-error skip",
                )
            photo = replace(photo, problem="no label")
        yield LabelledImage(photo, label, place, size, stored, config.on_error)


def in_groups(items: Iterator[LabelledImage], size: int) -> Iterator[list[LabelledImage]]:
    """Yield lists of `size` items, the last one shorter."""
    while group := list(islice(items, size)):
        yield group
