"""Train an encoder to say the class of each pixel, and judge it by intersection over union."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.judging.pictures import PredictionWriter, mark_place, require_place
from pipelines.loading.base_given import given_by
from pipelines.loading.encoder_source import load_encoder
from pipelines.training.running import Ran, prepared_compute, run_task, with_micro_batch
from pipelines.training.tuning import TuningSummary, reader_settings, said_of, shared_settings, shared_summary
from tec_cache.data.classes import read_classes
from tec_cache.data.source import open_source
from tec_cache.device import Compute
from tec_cache.distributed import Ranks, agreed, process_group
from tec_cache.errors import ConfigError
from tec_cache.finetune.classifier import LoadedEncoder
from tec_cache.labelled import EvaluationReader, PhotoReader
from tec_cache.labelled.joint import joint_transform, whole_transform
from tec_cache.labelled.masked import MaskedIndex, highest_value, index_masked_photos
from tec_cache.mask_values import Values
from tec_cache.printable import counted
from tec_cache.run.micro_batches import count_micro_batches
from tec_cache.segment.config import SegmentConfig
from tec_cache.segment.model import Segmenter, create_segmenter
from tec_cache.segment.recipes import Chosen, SegmentRecipe, recipe_for
from tec_cache.tasks.segment import MOST_AT_ONCE, Segment
from tec_cache.urls import without_secrets


@dataclass(kw_only=True)
class SegmentSummary(TuningSummary):
    """What a segmentation did; scores are mean IoU (the main one), pixel accuracy and the classes' mean accuracy."""

    head: str
    ignore: int
    """Value of masks that is neither learned nor judged."""
    iou: list[float | None] = field(default_factory=list)
    """Of each class at the last judgement; None where neither a mask nor a prediction has it."""
    accuracy: list[float | None] = field(default_factory=list)
    """Share of each class's pixels that are right; None where no mask has it."""
    pixels: list[int] = field(default_factory=list)
    """Of each class in the masks that are judged."""
    predictions: str | None = None
    """Folder of the predicted masks and pictures."""


SHOWN = ("epochs", "warmup_epochs", "batch_size", "base_lr", "min_lr", "schedule", "weight_decay", "layer_decay",
         "drop_path")  # fmt: skip
AUGMENTATION = ("crop_scale", "jitter", "colour", "grey", "blur")
"""Settings of it."""


def segment(
    config: SegmentConfig,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
    ranks: Ranks | None = None,
) -> SegmentSummary:
    """Train a segmenter on an encoder and judge it.

    Goes on from the last checkpoint of `config.out` where there is one; of a run that had reached its end, judges the
    last one again. overwrite: remove the run that lies there first, and nothing else. Raises ConfigError,
    IdentityError, SourceError, WeightsError, NonFiniteError, or TecCacheError where the folder holds something that is
    no such run.
    """
    ranks = ranks or Ranks.from_environment()
    compute, shown = prepared_compute(config, ranks), quiet or not ranks.main
    with process_group(ranks, compute.device):
        if config.save_predictions is not None:
            require_place(Path(config.save_predictions))
        train, test = indexed(config, config.train, shown), None
        if config.test is not None:
            test = indexed(config, config.test, shown)
        chosen = recipe_for(config.recipe, config.head, len(train))  # type: ignore[arg-type]
        name, config = config.model, config.resolved(chosen.recipe)
        most = MOST_AT_ONCE[config.head]
        config = with_micro_batch(config, Segment.name, most, compute, ranks, overwrite=overwrite)
        photos = Photos.numbered(config, train, test, ranks, quiet=shown)
        encoder = load_for(config, chosen.recipe)
        model = create_segmenter(
            encoder,
            photos.values.num_classes,
            head=config.head,  # type: ignore[arg-type]
            tune=config.tune,
            drop_path=config.drop_path or 0.0,
            seed=config.seed,
        )

        require_pairs(config, ranks)

        def task() -> Segment:
            learned, judged = readers(config, chosen.recipe, model, photos, compute, ranks)
            return Segment(config, model, learned, judged, compute, ranks)

        settings = resolved_settings(config, chosen, encoder, photos)
        how = {"overwrite": overwrite, "dry_run": dry_run, "quiet": shown}
        ran = run_task(task, settings, config, compute, ranks, **how)
        if not dry_run and ran.done.finished:
            judge_last(config, ran, photos)
        scores = ran.task.scores
        return SegmentSummary(
            **shared_summary(config, ran, "test_miou", SHOWN),
            model=name,
            recipe=chosen.name,
            why=chosen.why,
            tune=config.tune,
            head=config.head,
            ignore=photos.values.ignore,
            train_images=len(photos.train),
            test_images=len(photos.test),
            judged_on=photos.judged_on,
            classes=photos.values.num_classes,
            class_names=None if photos.classes is None else list(photos.classes),
            remarks=photos.remarks,
            iou=list(scores.iou) if scores else [],
            accuracy=list(scores.accuracy) if scores else [],
            pixels=list(scores.pixels) if scores else [],
            predictions=config.save_predictions if ran.task.writer is not None else None,
        )


def require_pairs(config: SegmentConfig, ranks: Ranks) -> None:
    """Refuse UPerNet where its BatchNorm would see one photo: of a map of one cell there is no deviation."""
    photos = config.batch_size // ranks.world_size // count_micro_batches(config, ranks)
    if config.head == "upernet" and photos < 2:
        raise ConfigError(
            "upernet normalizes over photos, and there is one in a forward pass",
            todo="give --micro-batch 2 or more, and a --batch-size of 2 or more for each process",
        )


def judge_last(config: SegmentConfig, ran: Ran[Segment], photos: Photos) -> None:
    """Judge the finished model once more where its predictions are asked for, or nobody has judged it in this call."""
    task = ran.task
    if config.save_predictions is not None:
        if ran.loop.ranks.main:
            mark_place(Path(config.save_predictions), config.out)
        task.writer = PredictionWriter(Path(config.save_predictions), photos.test)
    if task.writer is not None or task.scores is None:
        ran.loop.evaluate()


@dataclass(frozen=True)
class Photos:
    """What is learned from and what is judged on, and what the values of the masks mean."""

    train: MaskedIndex
    test: MaskedIndex
    values: Values
    classes: tuple[str, ...] | None
    judged_on: str
    remarks: list[str]

    @classmethod
    def numbered(
        cls, config: SegmentConfig, train: MaskedIndex, test: MaskedIndex | None, ranks: Ranks, *, quiet: bool
    ) -> Photos:
        """Say how many classes there are: as many as are named, else as the masks to learn from have."""
        names = None if config.classes is None else read_classes(config.classes)
        remarks = said_of(train)
        if names is not None:
            count = len(names)
        else:
            looked = highest_value(train, config.ignore, quiet=quiet, on_error=config.on_error) if ranks.main else None
            highest = agreed(looked, ranks)
            assert highest is not None, "rank 0 has looked"
            count = highest + 1 - (highest > config.ignore)
            remarks.insert(
                0, f"{counted(count, 'class')}, because {highest} is the highest value of the masks to learn from"
            )
        values = Values(config.ignore, count)
        train = replace(train, values=values, classes=names)
        if test is None:
            assert config.select is not None
            learned, held = train.divided(config.select, seed=config.seed)
            remarks.insert(0, "nothing here was judged on test photos")
            return cls(learned, held, values, names, f"{config.select:g} of {config.train}, held out", remarks)
        known = highest_value(test, config.ignore, quiet=quiet, on_error=config.on_error) if ranks.main else None
        require_known(values, agreed(known, ranks) or 0, str(config.test))
        test = replace(test, values=values, classes=names)
        return cls(train, test, values, names, str(config.test), [*remarks, *said_of(test)])


def require_known(values: Values, highest: int, place: str) -> None:
    """Refuse masks with a value beyond all classes before an epoch is spent on finding it."""
    try:
        values.classes(np.array([[highest]], np.int32))
    except ConfigError as error:
        raise ConfigError(error.what, where=without_secrets(place), todo=error.todo) from error


def indexed(config: SegmentConfig, place: str, quiet: bool) -> MaskedIndex:
    """Look through the photos and masks of one input."""
    return index_masked_photos(open_source(place).with_masks(), quiet=quiet, on_error=config.on_error)


def load_for(config: SegmentConfig, recipe: SegmentRecipe) -> LoadedEncoder:
    """Load the encoder for the patches that are asked for, or as many as the recipe's pixels have."""

    def loaded(grid: int | None) -> LoadedEncoder:
        return load_encoder(
            config.model, config.weights, grid=grid, given=given_by(config), seed=config.seed, tuned=True
        )

    encoder = loaded(config.grid)
    if config.grid is not None or recipe.size is None:
        return encoder
    patch = int(encoder.model.patch_embed.patch_size[0])
    grid = max(1, round(recipe.size / patch))
    return encoder if grid * patch == encoder.input_size else loaded(grid)


def readers(
    config: SegmentConfig,
    recipe: SegmentRecipe,
    model: Segmenter,
    photos: Photos,
    compute: Compute,
    ranks: Ranks,
) -> tuple[PhotoReader, EvaluationReader]:
    """Return what reads the photos to learn from, augmented, and those to judge on, one at a time."""
    shared = reader_settings(config, compute, ranks)
    pixels: dict[str, Any] = {"mean": model.mean, "std": model.std}
    augmentation = {name: getattr(config, name) for name in AUGMENTATION}
    augmented = joint_transform(model.input_size, crop=recipe.crop, **pixels, **augmentation)
    plain = whole_transform(model.input_size, model.patch, whole=model.kind == "linear", **pixels)
    return (
        PhotoReader(photos.train, augmented, batch_size=config.batch_size, seed=config.seed, **shared),
        EvaluationReader(photos.test, plain, batch_size=1, **shared),
    )


def resolved_settings(config: SegmentConfig, chosen: Chosen, encoder: LoadedEncoder, photos: Photos) -> dict[str, Any]:
    """Return everything that made a run, as it is kept in run.json."""
    return shared_settings(Segment.name, config, encoder) | {
        "recipe": chosen.name,
        "num_classes": photos.values.num_classes,
        "classes": None if photos.classes is None else list(photos.classes),
        "train": photos.train.fingerprint(),
        "test": photos.test.fingerprint(),
    }
