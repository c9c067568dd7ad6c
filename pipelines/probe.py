"""Judge a frozen model: features of labelled images, then nearest neighbours and a linear classifier."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from pipelines.judging.probe_inputs import Numbering, Part, no_label, number_classes, open_part
from pipelines.loading.base_given import given_by, load_judged
from tec_cache.base.model import FrozenBase
from tec_cache.cache.pixels import decode_crop, resize
from tec_cache.config import ProbeConfig
from tec_cache.data.images import decode_photo
from tec_cache.data.photos import Photo
from tec_cache.data.views import ViewPlan
from tec_cache.device import Compute, available_cores, resolve_compute
from tec_cache.errors import ConfigError, SourceError
from tec_cache.probe.knn import knn_accuracy
from tec_cache.probe.linear import linear_accuracy
from tec_cache.progress import Progress
from tec_cache.urls import without_secrets


@dataclass
class ProbeSummary:
    """What the probes found; accuracies from 0 to 1."""

    model: str
    knn: float
    linear: float
    linear_converged: bool
    train_images: int
    test_images: int
    skipped: int
    """Photos left out of both parts, those that a cache had left out before included."""
    left_out: dict[str, int]
    """Why, and how many of them."""
    noted: dict[str, int]
    """What was not understood of photos that were used, and of how many."""
    classes: int
    class_names: list[str] | None
    """In the order of their numbers; None where labels are numbers only."""
    remark: str
    """What was assumed of the classes; empty where nothing was."""
    features: int
    images_per_second: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass
class Features:
    """What a model makes of one part's images."""

    values: torch.Tensor
    """(N, C) float32 on the device, after the final LayerNorm: the mean of the patch tokens, or the class token."""
    labels: torch.Tensor
    """(N,) int64, classes of the probe."""
    left_out: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)


def probe(config: ProbeConfig, *, quiet: bool = True) -> ProbeSummary:
    """Extract frozen features of both parts and score both probes. Raises ConfigError, SourceError, WeightsError."""
    begin = time.monotonic()
    parts = open_part(config.train), open_part(config.test)
    *numberings, remark = number_classes(*parts)
    compute = resolve_compute(config.device, config.precision)
    model = load_model(config).to(compute.device)
    train, test = (
        features_of(model, part, numbering, config, compute, quiet)
        for part, numbering in zip(parts, numberings, strict=True)
    )
    seconds = time.monotonic() - begin
    data = (train.values, train.labels, test.values, test.labels)
    linear = linear_accuracy(*data, l2=config.l2, max_iter=2000)
    names = parts[0].classes or parts[1].classes
    return ProbeSummary(
        model=config.model,
        knn=knn_accuracy(*data, k=config.neighbours),
        linear=linear.accuracy,
        linear_converged=linear.converged,
        train_images=len(train.values),
        test_images=len(test.values),
        skipped=(train.left_out + test.left_out).total(),
        left_out=dict(train.left_out + test.left_out),
        noted=dict(train.noted + test.noted),
        classes=len(names) if names else int(train.labels.max()) + 1,
        class_names=list(names) if names else None,
        remark=remark,
        features=train.values.shape[1],
        images_per_second=(len(train.values) + len(test.values)) / seconds,
        seconds=time.monotonic() - begin,
    )


def load_model(config: ProbeConfig) -> FrozenBase:
    """Load what is to be judged: `random:NAME`, or anything that `--base` takes."""
    return load_judged(config.model, config.weights, grid=config.grid, given=given_by(config))


def features_of(
    model: FrozenBase, part: Part, numbering: Numbering, config: ProbeConfig, compute: Compute, quiet: bool
) -> Features:
    """Return the features and classes of a part's images. Raises SourceError where none is usable."""
    batches, labels = [], []
    left_out, noted = Counter(map(kind_of, part.left_out_before())), Counter[str]()
    mean = torch.tensor(model.mean, device=compute.device)[:, None, None]
    std = torch.tensor(model.std, device=compute.device)[:, None, None]
    workers = config.workers or available_cores()
    with (
        ThreadPoolExecutor(workers) as pool,
        Progress(f"features of {without_secrets(part.source)}", noun="images", quiet=quiet) as progress,
    ):
        for group in in_groups(labelled_images(part, numbering, model.input_size, config), config.batch_size):
            results = list(pool.map(lambda item: item.load(), group))
            left_out.update(kind_of(loaded.problem) for loaded in results if loaded.problem)
            noted.update(kind_of(loaded.note) for loaded in results if loaded.note)
            pixels = [loaded.pixels for loaded in results if loaded.pixels is not None]
            if not pixels:
                continue
            images = torch.from_numpy(np.stack(pixels)).to(compute.device)
            images = images.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
            with torch.no_grad(), compute.autocast():
                tokens: torch.Tensor = model.model.forward_features(images)  # type: ignore[operator]
            pooled = tokens[:, 0] if config.pool == "class" else tokens[:, model.num_prefix :].mean(dim=1)
            batches.append(pooled.float())
            labels += [item.label for item, loaded in zip(group, results, strict=True) if loaded.pixels is not None]
            progress.advance(len(pixels))
    if not batches:
        why = "".join(f"; {number:,} left out: {kind}" for kind, number in left_out.items())
        raise SourceError(f"there are no usable images{why}", where=without_secrets(part.source))
    return Features(torch.cat(batches), torch.tensor(labels, device=compute.device), left_out, noted)


def kind_of(problem: str) -> str:
    """Return what problems of one kind have in common: no details in brackets or after a colon, no numbers."""
    return re.sub(r" \(.*|[:;].*", "", problem, flags=re.DOTALL).strip()


class Loaded(NamedTuple):
    """An image as the model sees it."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]] | None
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
