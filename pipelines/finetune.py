"""Fine-tune an encoder on labelled photos, wholly or lightly, and judge it: the number that the paper reports."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.judging.probe_inputs import Part, number_classes
from pipelines.loading.base_given import given_by
from pipelines.loading.encoder_source import load_encoder
from pipelines.training.running import prepared_compute, run_task, with_micro_batch
from pipelines.training.tuning import TuningSummary, reader_settings, said_of, shared_settings, shared_summary
from tec_cache.data.classes import read_classes
from tec_cache.data.source import open_source
from tec_cache.device import Compute
from tec_cache.distributed import Ranks, process_group
from tec_cache.errors import ConfigError
from tec_cache.finetune.classifier import Classifier, LoadedEncoder
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.finetune.model import create_classifier
from tec_cache.finetune.recipes import Chosen, named_recipe, recipe_for, rule_for
from tec_cache.labelled import (
    EvaluationReader,
    LabelledIndex,
    PhotoReader,
    evaluation_transform,
    index_photos,
    train_transform,
)
from tec_cache.printable import counted
from tec_cache.run.micro_batches import count_micro_batches
from tec_cache.tasks.classify import MOST_AT_ONCE, Classify


@dataclass(kw_only=True)
class FinetuneSummary(TuningSummary):
    """What a fine-tuning did; scores are loss, top-1 and top-5, the main one is top-1."""

    rule: str


def finetune(
    config: FinetuneConfig,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
    ranks: Ranks | None = None,
) -> FinetuneSummary:
    """Train a classifier on an encoder and judge it after every epoch.

    Goes on from the last checkpoint of `config.out` where there is one. overwrite: remove the run that lies there
    first, and nothing else. Raises ConfigError, IdentityError, SourceError, WeightsError, NonFiniteError, or
    TecCacheError where the folder holds something that is no such run.
    """
    ranks = ranks or Ranks.from_environment()
    compute, shown = prepared_compute(config, ranks), quiet or not ranks.main
    with process_group(ranks, compute.device):
        photos = Photos.found(config, quiet=shown)
        encoder = load_encoder(config.model, config.weights, grid=config.grid, given=given_by(config), seed=config.seed)
        rule = rule_for(config.tune, config.rule)  # type: ignore[arg-type]
        chosen = chosen_recipe(config, encoder, len(photos.train))
        name, config = config.model, config.resolved(chosen.recipe)
        config = with_micro_batch(config, Classify.name, MOST_AT_ONCE, compute, ranks, overwrite=overwrite)
        model = create_classifier(
            encoder,
            photos.num_classes,
            tune=config.tune,  # type: ignore[arg-type]
            rule=rule,
            drop_path=config.drop_path or 0.0,
            adapters_from=config.adapters_from,
            seed=config.seed,
        )

        def task() -> Classify:
            learned, judged = readers(config, model, photos, compute, ranks)
            return Classify(config, chosen.recipe, model, learned, judged, compute, ranks)

        settings = resolved_settings(config, chosen, rule, encoder, photos)
        how = {"overwrite": overwrite, "dry_run": dry_run, "quiet": shown}
        ran = run_task(task, settings, config, compute, ranks, **how)
        return FinetuneSummary(
            **shared_summary(config, ran, "test_top1", SHOWN),
            model=name,
            recipe=chosen.name,
            why=chosen.why,
            tune=config.tune,
            rule=rule,
            train_images=len(photos.train),
            test_images=len(photos.test),
            judged_on=photos.judged_on,
            classes=photos.num_classes,
            class_names=None if photos.classes is None else list(photos.classes),
            remarks=photos.remarks,
        )


def readers(
    config: FinetuneConfig,
    model: Classifier,
    photos: Photos,
    compute: Compute,
    ranks: Ranks,
) -> tuple[PhotoReader, EvaluationReader]:
    """Return what reads the photos to learn from, augmented, and those to judge on."""
    shared = reader_settings(config, compute, ranks)
    policy = None if config.auto_augment == "none" else config.auto_augment
    try:
        augmented = train_transform(
            model.input_size,
            mean=model.mean,
            std=model.std,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            flip=config.flip,
            auto_augment=policy,
            erase=config.reprob,
        )
    except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
        todo = "write it as timm does (rand-m9-mstd0.5-inc1), or none"
        raise ConfigError(f"--auto-augment {policy}: timm knows no such policy", todo=todo) from error
    plain = evaluation_transform(model.input_size, model.mean, model.std)
    each = max(1, config.batch_size // ranks.world_size // count_micro_batches(config, ranks))
    return (
        PhotoReader(photos.train, augmented, batch_size=config.batch_size, seed=config.seed, **shared),
        EvaluationReader(photos.test, plain, batch_size=min(each, MOST_JUDGED), **shared),
    )


MOST_JUDGED = 256
"""Photos of a batch that is judged."""
SHOWN = ("epochs", "warmup_epochs", "batch_size", "optimizer", "base_lr", "min_lr", "weight_decay", "layer_decay",
         "drop_path", "mixup", "cutmix", "smoothing", "reprob", "auto_augment", "crop_scale", "flip")  # fmt: skip


def chosen_recipe(config: FinetuneConfig, encoder: LoadedEncoder, num_images: int) -> Chosen:
    """Return the recipe that was named, or the one that goes with the model, and why."""
    if config.recipe is not None:
        return Chosen(config.recipe, named_recipe(config.recipe), "it was asked for")
    return recipe_for(
        config.tune,  # type: ignore[arg-type]
        config.rule,  # type: ignore[arg-type]
        encoder.made_of,
        num_images=num_images,
    )


@dataclass(frozen=True)
class Photos:
    """What is learned from and what is judged on, under one numbering of the classes."""

    train: LabelledIndex
    test: LabelledIndex
    num_classes: int
    classes: tuple[str, ...] | None
    judged_on: str
    remarks: list[str]

    @classmethod
    def found(cls, config: FinetuneConfig, *, quiet: bool) -> Photos:
        """Look both inputs through. Raises ConfigError where their classes do not agree."""
        names = None if config.classes is None else read_classes(config.classes)
        train = indexed(config, config.train, names, quiet=quiet)
        if config.select is not None:
            learned, held = train.divided(config.select, seed=config.seed)
            judged_on = f"{config.select:g} of {config.train}, held out of training"
            remark = "nothing here was judged on test photos"
            return cls(learned, held, train.num_classes, train.classes, judged_on, [remark, *said_of(train)])
        assert config.test is not None
        test = indexed(config, config.test, names, quiet=quiet)
        train, test, classes, remark = same_classes(config, train, test)
        count = len(classes) if classes is not None else train.num_classes
        unseen = int(test.label.max()) + 1
        if unseen > count:
            raise ConfigError(
                f"a photo to be judged is of class {unseen - 1}; those to learn from have {counted(count, 'class')}, "
                "from 0 on",
                where=config.test,
                todo="judge on classes that were learned",
            )
        remarks = [*([remark] if remark else []), *said_of(train), *said_of(test)]
        return cls(train, test, count, classes, config.test, remarks)


def indexed(config: FinetuneConfig, place: str, names: tuple[str, ...] | None, *, quiet: bool) -> LabelledIndex:
    """Look through the photos of one input."""
    source = open_source(place, classes=names, label_field=config.label_field).with_labels(quiet=quiet)
    return index_photos(source, quiet=quiet, on_error=config.on_error)


def same_classes(
    config: FinetuneConfig, train: LabelledIndex, test: LabelledIndex
) -> tuple[LabelledIndex, LabelledIndex, tuple[str, ...] | None, str]:
    """Bring the labels of both under one numbering; return the names, and what was assumed."""
    parts = Part(config.train, train.classes), Part(str(config.test), test.classes)
    *numberings, remark = number_classes(*parts)
    numbered = []
    for index, numbering, part in zip((train, test), numberings, parts, strict=True):
        highest = int(index.label.max())
        if numbering.most is not None and highest >= numbering.most:
            raise ConfigError(
                f"a photo is of class {highest}; the other part names {counted(numbering.most, 'class')}, from 0 on",
                where=part.source,
                todo="give both parts in the same form: class folders, or tars with the same numbers",
            )
        if numbering.numbers is not None:
            index = replace(index, label=np.asarray(numbering.numbers, np.int64)[index.label])
        numbered.append(index)
    return numbered[0], numbered[1], train.classes or test.classes, remark


def resolved_settings(
    config: FinetuneConfig, chosen: Chosen, rule: str, encoder: LoadedEncoder, photos: Photos
) -> dict[str, Any]:
    """Return everything that made a run, as it is kept in run.json."""
    return shared_settings(Classify.name, config, encoder) | {
        "recipe": chosen.name,
        "rule": rule,
        "num_classes": photos.num_classes,
        "classes": None if photos.classes is None else list(photos.classes),
        "train": photos.train.fingerprint(),
        "test": photos.test.fingerprint(),
    }
