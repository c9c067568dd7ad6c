"""Tuned models rebuilt from their runs, and what they say of photos: confusions, and classes over photos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipelines.export import last_checkpoint
from pipelines.judging.pictures import palette, picture
from pipelines.judging.probe_inputs import Part, number_classes
from tec_cache.base.load import create, outline
from tec_cache.data.images import decode_photo
from tec_cache.data.source import open_source
from tec_cache.device import Compute
from tec_cache.errors import ConfigError, SourceError, TecCacheError
from tec_cache.finetune.classifier import LoadedEncoder
from tec_cache.finetune.model import create_classifier
from tec_cache.labelled import PhotoIndex, evaluation_transform, index_photos
from tec_cache.labelled.joint import whole_transform
from tec_cache.labelled.masked import index_masked_photos
from tec_cache.mask_values import Values
from tec_cache.model_args import BASE_ARGS, check_model_args
from tec_cache.printable import counted
from tec_cache.run.checkpoint import load_checkpoint, require_weights
from tec_cache.run.settings import load_settings, run_identity
from tec_cache.segment.model import create_segmenter
from tec_cache.segment.predict import predict
from tec_cache.segment.scores import confusion

_HIDDEN = "encoder_adapters.mlps.0.fc1.weight"
"""Says how wide the encoder adapters are."""


@dataclass(frozen=True)
class Judged:
    """What a tuned model says of some photos."""

    counts: npt.NDArray[np.int64]
    """(classes, classes), a row for each true class: of photos, or of pixels."""
    photos: int
    of: int
    """How many photos there were."""
    broken: int
    """Of those that were chosen, left out."""
    classes: tuple[str, ...] | None
    strips: list[tuple[str, npt.NDArray[np.uint8]]]
    """Of a segmentation: key, and photo, truth and prediction side by side."""


def tuned_model(run: Path) -> nn.Module:
    """Rebuild a classifier or segmenter from its run's settings and last checkpoint, to be judged.

    Raises TecCacheError where there is no checkpoint, or it does not fit.
    """
    settings = load_settings(run)
    path = last_checkpoint(run, None)
    state = load_checkpoint(path, run_identity(settings))["model"]
    source, config = _encoder_of(settings, state, str(run)), settings["config"]
    if settings["task"] == "classify":
        with_adapters = config["tune"] in ("input-adapter", "adapters") or (
            config["tune"] == "full" and settings["rule"] == "tec"
        )
        model: nn.Module = create_classifier(
            source,
            settings["num_classes"],
            tune=config["tune"],
            rule=settings["rule"],
            adapters_from="random" if with_adapters else "pretrained",
        )
    else:
        model = create_segmenter(source, settings["num_classes"], head=config["head"], tune=config["tune"])
    require_weights(state, model, path)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def _encoder_of(settings: dict[str, Any], state: dict[str, Any], where: str) -> LoadedEncoder:
    """Return the encoder that a run began with, without its weights: all of them are in the checkpoint."""
    made = settings["model"]
    try:
        name, size = str(made["architecture"]).partition(".")[0], int(made["input_size"])
        args = {n: v for n, v in dict(made["model_args"]).items() if n not in ("img_size", "num_classes")}
        statistics = tuple(made["mean"]), tuple(made["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise TecCacheError("run.json does not say which model this is", where=where) from error
    args = check_model_args(args, where, BASE_ARGS)
    shape: Any = outline(name, args, where).patch_embed
    vit: Any = create(name, args, size // int(shape.patch_size[0]), where)
    known = {"": {"mlps.0.fc1.weight": state[_HIDDEN]}} if _HIDDEN in state else {}
    return LoadedEncoder(model=vit, architecture=name, model_args=args, mean=statistics[0], std=statistics[1],
                         adapters_states=known)  # fmt: skip


@torch.no_grad()
def judge_classifier(run: Path, photos: str, limit: int, compute: Compute) -> Judged:
    """Count which classes a fine-tuned model takes labelled photos for.

    Names of classes are matched with the run's; numbers are taken as they are. Raises SourceError and ConfigError for
    photos without labels, or of classes that were not learned.
    """
    settings = load_settings(run, "classify")
    model: Any = tuned_model(run).to(compute.device)
    index = index_photos(
        open_source(photos, label_field=settings["config"].get("label_field")).with_labels(), on_error="skip"
    )
    names = None if settings["classes"] is None else tuple(settings["classes"])
    _, numbering, _ = number_classes(Part("the run", names), Part(photos, index.classes))
    labels = index.label if numbering.numbers is None else np.asarray(numbering.numbers, np.int64)[index.label]
    count = int(settings["num_classes"])
    if int(labels.max()) >= count:
        what = f"a photo is of class {int(labels.max())}; the run learned {counted(count, 'class')}, from 0 on"
        raise ConfigError(what, where=photos, todo="give photos of classes that were learned")
    transform = evaluation_transform(model.input_size, model.mean, model.std)
    counts = np.zeros((count, count), np.int64)
    chosen = spread(len(index), limit)
    for part in batched(chosen, 32):
        read = {number: _example(index, number, transform) for number in part}
        whole = {number: example[0] for number, example in read.items() if example is not None}
        if whole:
            said = model(torch.stack(list(whole.values())).to(compute.device)).argmax(dim=1).cpu().numpy()
            np.add.at(counts, (labels[list(whole)], said), 1)
    return Judged(counts, len(chosen), len(index), len(chosen) - int(counts.sum()), names, [])


@torch.no_grad()
def judge_segmenter(run: Path, photos: str, limit: int, pictures: int, compute: Compute) -> Judged:
    """Count which classes a segmenter takes pixels for, and lay some predictions over their photos."""
    settings = load_settings(run, "segment")
    model: Any = tuned_model(run).to(compute.device)
    count = int(settings["num_classes"])
    found = index_masked_photos(open_source(photos).with_masks(), on_error="skip")
    index = replace(found, values=Values(int(settings["config"]["ignore"]), count))
    transform = whole_transform(model.input_size, model.patch, whole=model.kind == "linear", mean=model.mean,
                                std=model.std)  # fmt: skip
    counts = torch.zeros(count, count, dtype=torch.int64)
    colours, strips = palette(count), []
    chosen, broken = spread(len(index), limit), 0
    drawn = set(spread(len(chosen), pictures))
    for place, number in enumerate(chosen):
        example = _example(index, number, transform)
        if example is None:
            broken += 1
            continue
        image, classes = example
        size = (classes.shape[0], classes.shape[1])
        said = predict(model, image[None].to(compute.device), size).cpu()
        counts += confusion(classes[None], said, count)
        if place in drawn:
            photo = decode_photo(index.read(number)).image
            parts = [np.asarray(photo.resize(size[::-1]))]
            parts += [np.asarray(picture(photo, of.numpy(), colours)) for of in (classes, said[0])]
            strips.append((index.key(number), np.concatenate(parts, axis=1)))
    names = None if settings["classes"] is None else tuple(settings["classes"])
    return Judged(counts.numpy(), len(chosen), len(index), broken, names, strips)


def _example(index: PhotoIndex, number: int, transform: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a photo and what it is annotated with as a transform makes them; None for a broken photo."""
    try:
        return index.example(number, transform)
    except SourceError:
        return None


def spread(count: int, most: int) -> list[int]:
    """Return at most so many numbers below `count`, as far apart as possible, the same ones each time."""
    return [i * count // min(most, count) for i in range(min(most, count))]


def batched(numbers: list[int], size: int) -> Iterator[list[int]]:
    """Yield parts of a list."""
    rest = iter(numbers)
    while part := list(islice(rest, size)):
        yield part
