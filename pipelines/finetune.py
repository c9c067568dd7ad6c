"""Fine-tune an encoder on labelled photos, wholly or lightly, and judge it: the number that the paper reports."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.judging.probe_inputs import Part, number_classes
from pipelines.loading.base_given import given_by
from pipelines.loading.encoder_source import load_encoder
from tec_cache.data.classes import read_classes
from tec_cache.data.source import open_source
from tec_cache.device import Compute, default_threads, default_workers, resolve_compute
from tec_cache.distributed import Ranks, process_group
from tec_cache.errors import ConfigError
from tec_cache.finetune.classifier import Classifier, LoadedEncoder
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.finetune.model import create_classifier
from tec_cache.finetune.recipes import Chosen, FinetuneRecipe, named_recipe, recipe_for, rule_for
from tec_cache.labelled import (
    EvaluationReader,
    PhotoIndex,
    PhotoReader,
    evaluation_transform,
    index_photos,
    train_transform,
)
from tec_cache.run.beginning import begin_run, find_start
from tec_cache.run.checkpoint import FORMAT
from tec_cache.run.folder import foreign_files
from tec_cache.run.loop import Loop, LoopSummary
from tec_cache.run.metrics import read_metrics
from tec_cache.run.micro_batches import count_micro_batches
from tec_cache.tasks.classify import Classify
from tec_cache.urls import without_secrets


@dataclass(kw_only=True)
class FinetuneSummary(LoopSummary):
    """What a fine-tuning did, and the numbers that it reached; accuracies from 0 to 1."""

    model: str
    recipe: str
    why: str
    """Why it is this recipe."""
    tune: str
    rule: str
    settings: dict[str, Any]
    """Of the recipe, as they were resolved."""
    train_images: int
    test_images: int
    judged_on: str
    classes: int
    remarks: list[str]
    """What was assumed of the classes, and what of the photos was left out."""
    left_out: int
    """Photos of each epoch that filled no batch; others in each epoch."""
    last: dict[str, float]
    """Loss, top-1 and top-5 after the last epoch."""
    best: dict[str, float]
    """The same, and the step, of the highest top-1 of all epochs: chosen by looking at the photos that are judged."""
    damaged: list[str]
    foreign: list[str] = field(default_factory=list)
    """What lies in the run's folder beside the run."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


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
    compute = resolve_compute(config.device, config.precision, ranks.local_rank)
    if compute.device.type == "cpu":
        share = default_threads(ranks.local_world_size) // ranks.local_world_size
        torch.set_num_threads(config.threads or max(1, share))
    run, shown = Path(config.out), quiet or not ranks.main
    with process_group(ranks, compute.device.type), ExitStack() as lock:
        photos = Photos.found(config, quiet=shown)
        encoder = load_encoder(config.model, config.weights, grid=config.grid, given=given_by(config), seed=config.seed)
        rule = rule_for(config.tune, config.rule)  # type: ignore[arg-type]
        chosen = chosen_recipe(config, encoder, len(photos.train))
        asked, config = config, config.resolved(chosen.recipe)
        model = create_classifier(
            encoder,
            photos.num_classes,
            tune=config.tune,  # type: ignore[arg-type]
            rule=rule,
            drop_path=config.drop_path or 0.0,
            adapters_from=config.adapters_from,
            seed=config.seed,
        )
        settings = resolved_settings(config, chosen, rule, encoder, photos)
        start = find_start(run, settings, overwrite=overwrite)
        learned, judged = readers(config, chosen.recipe, model, photos, compute, ranks)
        task = Classify(config, chosen.recipe, model, learned, judged, compute, ranks)
        loop = Loop(task, config, compute, ranks)
        settings["total_steps"] = loop.total_steps
        if not dry_run:
            start = begin_run(run, settings, overwrite=overwrite, ranks=ranks, lock=lock)
        loop.resume(start.checkpoint, start.identity)
        done = loop.summary(finished=False, seconds=0.0) if dry_run else loop.run(run, start.identity, quiet=shown)
        scores = [] if dry_run or not ranks.main else [line for line in read_metrics(run) if "test_top1" in line]
        return FinetuneSummary(
            **vars(done),
            model=asked.model,
            recipe=chosen.name,
            why=chosen.why,
            tune=config.tune,
            rule=rule,
            settings={name: getattr(config, name) for name in SHOWN},
            train_images=len(photos.train),
            test_images=len(photos.test),
            judged_on=photos.judged_on,
            classes=photos.num_classes,
            remarks=photos.remarks,
            left_out=learned.left_out,
            last=scores_of(scores[-1]) if scores else {},
            best=scores_of(max(scores, key=lambda line: float(line["test_top1"]))) if scores else {},
            damaged=sorted(learned.damaged | judged.damaged),
            foreign=[] if dry_run else foreign_files(run, start.identity),
        )


def readers(
    config: FinetuneConfig,
    recipe: FinetuneRecipe,
    model: Classifier,
    photos: Photos,
    compute: Compute,
    ranks: Ranks,
) -> tuple[PhotoReader, EvaluationReader]:
    """Return what reads the photos to learn from, augmented, and those to judge on."""
    shared: dict[str, Any] = {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "workers": config.workers or default_workers(compute.device, ranks.local_world_size),
        "pin_memory": compute.device.type == "cuda",
        "on_error": config.on_error,
    }
    augmented = train_transform(
        model.input_size,
        mean=model.mean,
        std=model.std,
        scale=recipe.crop_scale,
        ratio=recipe.crop_ratio,
        flip=recipe.flip,
        auto_augment=recipe.auto_augment,
        erase=recipe.reprob,
    )
    plain = evaluation_transform(model.input_size, model.mean, model.std)
    each = max(1, config.batch_size // ranks.world_size // count_micro_batches(config, ranks))
    return (
        PhotoReader(photos.train, augmented, batch_size=config.batch_size, seed=config.seed, **shared),
        EvaluationReader(photos.test, plain, batch_size=min(each, MOST_JUDGED), **shared),
    )


MOST_JUDGED = 256
"""Photos of a batch that is judged."""
SHOWN = ("epochs", "warmup_epochs", "batch_size", "optimizer", "base_lr", "min_lr", "weight_decay", "layer_decay",
         "drop_path", "mixup", "cutmix", "smoothing")  # fmt: skip


def scores_of(line: dict[str, Any]) -> dict[str, float]:
    """Return the scores of a line of metrics.jsonl, and its step."""
    return {name: float(value) for name, value in line.items() if name == "step" or name.startswith("test_")}


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

    train: PhotoIndex
    test: PhotoIndex
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
                f"a photo to be judged is of class {unseen - 1}; those to learn from have {count} classes, from 0 on",
                where=config.test,
                todo="judge on classes that were learned",
            )
        remarks = [*([remark] if remark else []), *said_of(train), *said_of(test)]
        return cls(train, test, count, classes, config.test, remarks)


def indexed(config: FinetuneConfig, place: str, names: tuple[str, ...] | None, *, quiet: bool) -> PhotoIndex:
    """Look through the photos of one input."""
    source = open_source(place, classes=names, label_field=config.label_field).with_labels(quiet=quiet)
    return index_photos(source, quiet=quiet, on_error=config.on_error)


def same_classes(
    config: FinetuneConfig, train: PhotoIndex, test: PhotoIndex
) -> tuple[PhotoIndex, PhotoIndex, tuple[str, ...] | None, str]:
    """Bring the labels of both under one numbering; return the names, and what was assumed."""
    parts = Part(config.train, train.classes), Part(str(config.test), test.classes)
    *numberings, remark = number_classes(*parts)
    numbered = []
    for index, numbering, part in zip((train, test), numberings, parts, strict=True):
        highest = int(index.label.max())
        if numbering.most is not None and highest >= numbering.most:
            raise ConfigError(
                f"a photo is of class {highest}; the other part names {numbering.most} classes, from 0 on",
                where=part.source,
                todo="give both parts in the same form: class folders, or tars with the same numbers",
            )
        if numbering.numbers is not None:
            index = replace(index, label=np.asarray(numbering.numbers, np.int64)[index.label])
        numbered.append(index)
    return numbered[0], numbered[1], train.classes or test.classes, remark


def said_of(index: PhotoIndex) -> list[str]:
    """Say what of an input was left out."""
    said = [f"without a label: {index.unlabelled}"] if index.unlabelled else []
    said += [f"not usable: {index.unusable}"] if index.unusable else []
    return said + [f"passed over: {kind} ({count:,})" for kind, count in index.passed_over.items()]


def resolved_settings(
    config: FinetuneConfig, chosen: Chosen, rule: str, encoder: LoadedEncoder, photos: Photos
) -> dict[str, Any]:
    """Return everything that made a run, as it is kept in run.json."""
    places: dict[str, Any] = {n: without_secrets(getattr(config, n)) for n in ("train", "test") if getattr(config, n)}
    made_of = {name: value for name, value in encoder.made_of.items() if name not in ("name", "export")}
    return {
        "format": FORMAT,
        "task": Classify.name,
        "config": asdict(replace(config, **places)),
        "recipe": chosen.name,
        "rule": rule,
        "model": made_of
        | {"mean": list(encoder.mean), "std": list(encoder.std), "input_size": encoder.input_size}
        | {"adapters": encoder.input_adapter_state is not None},
        "num_classes": photos.num_classes,
        "classes": None if photos.classes is None else list(photos.classes),
        "train": photos.train.fingerprint(),
        "test": photos.test.fingerprint(),
    }
