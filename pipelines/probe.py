"""Judge a frozen model: features of labelled images, then nearest neighbours and a linear classifier."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.base_given import given_by
from tec_cache.base.load import load_base, native_grid, random_model
from tec_cache.base.model import FrozenBase
from tec_cache.cache.layout import BLOCK_ROWS
from tec_cache.cache.pixels import decode_crop, resize
from tec_cache.cache.reader import open_cache
from tec_cache.config import ProbeConfig
from tec_cache.data.folders import folder_classes
from tec_cache.data.images import decode_photo
from tec_cache.data.photos import Photo
from tec_cache.data.source import find_shards
from tec_cache.data.views import ViewPlan
from tec_cache.device import Compute, available_cores, resolve_compute
from tec_cache.errors import ConfigError, SourceError, listed
from tec_cache.probe.knn import knn_accuracy
from tec_cache.probe.linear import linear_accuracy
from tec_cache.progress import Progress
from tec_cache.recipes import BASES


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
    classes: int
    features: int
    images_per_second: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def probe(config: ProbeConfig, *, quiet: bool = True) -> ProbeSummary:
    """Extract frozen features of both parts and score both probes. Raises ConfigError, SourceError, WeightsError."""
    begin = time.monotonic()
    require_same_classes(config.train, config.test)
    compute = resolve_compute(config.device, config.precision)
    model = load_model(config).to(compute.device)
    train, train_labels, bad_train = features_of(model, config.train, config, compute, quiet)
    test, test_labels, bad_test = features_of(model, config.test, config, compute, quiet)
    seconds = time.monotonic() - begin
    linear = linear_accuracy(train, train_labels, test, test_labels, l2=config.l2, max_iter=2000)
    return ProbeSummary(
        model=config.model,
        knn=knn_accuracy(train, train_labels, test, test_labels, k=config.neighbours),
        linear=linear.accuracy,
        linear_converged=linear.converged,
        train_images=len(train),
        test_images=len(test),
        skipped=bad_train + bad_test,
        classes=int(train_labels.max()) + 1,
        features=train.shape[1],
        images_per_second=(len(train) + len(test)) / seconds,
        seconds=time.monotonic() - begin,
    )


def require_same_classes(train: str, test: str) -> None:
    """Refuse two folders of photos whose class folders differ: their labels are numbered by folder."""
    ours, theirs = folder_classes(train), folder_classes(test)
    if ours is not None and theirs is not None and ours != theirs:
        raise ConfigError(
            f"the class folders differ: {listed(sorted(set(ours) ^ set(theirs)))} are in one of them only",
            where=f"{train} and {test}",
            todo="give both the same class folders, empty ones included",
        )


def load_model(config: ProbeConfig) -> FrozenBase:
    """Load what is to be judged: `random:NAME`, or anything that `--base` takes."""
    given = given_by(config)
    if config.model.startswith("random:"):
        if config.weights:
            raise ConfigError("a random model takes no --weights", todo="leave one of them out")
        name = config.model.removeprefix("random:")
        if name not in BASES and not Path(name).exists() and not name.startswith("timm:"):
            name = f"timm:{name}"
        return random_model(name, grid=config.grid or native_grid(name, None, given), given=given)
    grid = config.grid or native_grid(config.model, config.weights, given)
    return load_base(config.model, config.weights, grid=grid, k=None, given=given)


def features_of(
    model: FrozenBase, source: str, config: ProbeConfig, compute: Compute, quiet: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return features (N, C) float32 on the device, labels (N,) and how many photos were left out.

    Features follow the final LayerNorm: the mean of the patch tokens, or the class token.
    """
    batches, labels, skipped = [], [], 0
    mean = torch.tensor(model.mean, device=compute.device)[:, None, None]
    std = torch.tensor(model.std, device=compute.device)[:, None, None]
    workers = config.workers or available_cores()
    with (
        ThreadPoolExecutor(workers) as pool,
        Progress(f"features of {source}", noun="images", quiet=quiet) as progress,
    ):
        for group in in_groups(labelled_images(source, model.input_size, config), config.batch_size):
            results = list(pool.map(lambda item: item.load(), group))
            good = [(pixels, item.label) for pixels, item in zip(results, group, strict=True) if pixels is not None]
            skipped += len(results) - len(good)
            if not good:
                continue
            images = torch.from_numpy(np.stack([pixels for pixels, _ in good])).to(compute.device)
            images = images.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
            with torch.no_grad(), compute.autocast():
                tokens: torch.Tensor = model.model.forward_features(images)  # type: ignore[operator]
            pooled = tokens[:, 0] if config.pool == "class" else tokens[:, model.num_prefix :].mean(dim=1)
            batches.append(pooled.float())
            labels += [label for _, label in good]
            progress.advance(len(good))
    if not batches:
        raise SourceError("there are no usable images", where=source)
    return torch.cat(batches), torch.tensor(labels, device=compute.device), skipped


@dataclass(frozen=True)
class LabelledImage:
    """An image to be loaded by a worker, and its class."""

    photo: Photo
    label: int
    place: str
    size: int
    stored: bool
    on_error: str

    def load(self) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return (size, size, 3) uint8, or None for a broken photo that is to be left out."""
        if self.stored:
            return resize(decode_crop(self.photo.data), self.size)
        try:
            if self.photo.problem:
                raise SourceError(self.photo.problem)
            image = decode_photo(self.photo.data).image
        except SourceError as error:
            if self.on_error == "skip":
                return None
            raise SourceError(
                f"photo {self.photo.key!r}: {error.what}",
                where=self.place,
                todo="mend it, or --on-error skip",
            ) from error
        plan = ViewPlan(crop="center", size=self.size)
        return plan.cut(image, plan.view("", "", 0, image.width, image.height))


def labelled_images(source: str, size: int, config: ProbeConfig) -> Iterator[LabelledImage]:
    """Yield the labelled images of photos (centre crop) or of a cache (its stored crops of view 0)."""
    images = _of_cache(source) if (Path(source) / "cache.json").is_file() else _of_photos(source)
    stored = (Path(source) / "cache.json").is_file()
    for photo, place in islice(images, config.limit):
        if photo.label is None and not photo.problem:
            raise ConfigError(
                f"photo {photo.key!r} has no label",
                where=place,
                todo="probe photos with a .cls, or class folders",
            )
        yield LabelledImage(photo, photo.label if photo.label is not None else -1, place, size, stored, config.on_error)


def _of_photos(source: str) -> Iterator[tuple[Photo, str]]:
    for shard in find_shards(source):
        for photo in shard.photos():
            yield photo, shard.place


def _of_cache(source: str) -> Iterator[tuple[Photo, str]]:
    cache = open_cache(source)
    cache.require_complete(1)
    for unit in cache.view_units:
        if unit.view == 0:
            record = cache.views_record(unit)
            for start in range(0, len(record.keys), BLOCK_ROWS):
                rows = range(start, min(start + BLOCK_ROWS, len(record.keys)))
                for row, data in zip(rows, cache.read_crops(record, rows), strict=True):
                    yield Photo(record.keys[row], data, record.labels[row]), f"{cache.store.url}, unit {unit}"


def in_groups(items: Iterator[LabelledImage], size: int) -> Iterator[list[LabelledImage]]:
    """Yield lists of `size` items, the last one shorter."""
    while group := list(islice(items, size)):
        yield group
