"""The work of `benchmarks.gain`: one model made, or judged, in a process of its own.

    python -m benchmarks.gain.jobs OUT JOB

Everything is done by the programs that users run (`extract`, `train`, `rounds`, `export`, `finetune`, `probe`), which
go on where they were stopped. The result is OUT/results/JOB.json; there is none where a signal came in between.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gain import photos
from benchmarks.gain.plan import NEW, PIXELS, ROUNDS, TEST, UNTRAINED, Gain, Job, Model, base_of
from pipelines.export import export
from pipelines.extract import extract
from pipelines.finetune import finetune
from pipelines.probe import probe
from pipelines.reporting.judged import tuned_model
from pipelines.rounds import rounds
from pipelines.train import train
from tec_cache.config import ExtractConfig, ProbeConfig, TrainConfig
from tec_cache.data.source import open_source
from tec_cache.device import resolve_compute
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.labelled import EvaluationReader, evaluation_transform, index_photos
from tec_cache.rounds_config import RoundsConfig
from tec_cache.store.files import write_atomically

SETTINGS = "settings.json"
"""Of the folder of everything: the configuration."""
STUDENT = "vit_tiny_patch16_224"
SET = "base"
SEEDS = 10
"""Seeds of trainings that lie between two of ours: every round takes the next one."""
BATCH = 256
"""Photos that are judged at once."""


@dataclass(frozen=True)
class Place:
    """Where everything goes, and on what it is computed."""

    out: Path
    device: str
    threads: int
    workers: int

    @property
    def photos(self) -> Path:
        """Folder of the parts of the photos."""
        return self.out / "photos"

    @property
    def crops(self) -> Path:
        """The cache of views alone, of which each model that needs target sets has a copy."""
        return self.out / "crops"

    @property
    def cpu_threads(self) -> int | None:
        """Threads as the programs take them: they are a CPU's."""
        return self.threads if self.device == "cpu" else None

    def folder(self, model: Model) -> Path:
        """Folder of a model's runs."""
        return self.out / "models" / model.name

    def export(self, model: Model) -> Path:
        """The model itself."""
        return self.folder(model) / "export"

    def result(self, name: str) -> Path:
        """What a job found."""
        return self.out / "results" / f"{name}.json"


class Stopped(Exception):
    """A signal stopped a training; the same command goes on."""


def perform(job: Job, config: Gain, place: Place) -> dict[str, Any]:
    """Do a job; return what it found. Raises Stopped."""
    if job.what == "make":
        {PIXELS: make_pixels, NEW: make_new, ROUNDS: make_rounds}[job.model.kind](job.model, config, place)
        return {}
    return judge_by_test(job.model, config, place) if job.what == TEST else judge_by_valid(job.model, config, place)


def training(config: Gain, place: Place, cache: Path, out: Path, model: Model, **changes: Any) -> TrainConfig:
    """Return the recipe of every pretraining; `changes` is what an arm's letter says."""
    shape = {"patch_size": config.patch, "embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    values: dict[str, Any] = {
        "cache": str(cache),
        "out": str(out),
        "student": STUDENT,
        "student_args": shape,
        "decoder_depth": config.decoder_depth,
        "decoder_width": config.width,
        "decoder_heads": config.heads,
        "epochs": model.epochs,
        "batch_size": config.batch_size,
        "base_lr": config.base_lr,
        "seed": SEEDS * model.seed,
        "views": model.views,
        "device": place.device,
        "threads": place.cpu_threads,
        "workers": place.workers,
        "save_every": max(1.0, model.epochs / 8),
        "save_minutes": 2.0,
        "log_every": 50,
    }
    return TrainConfig(**(values | changes))


def make_pixels(model: Model, config: Gain, place: Place) -> None:
    """Train a masked autoencoder and export it."""
    run = place.folder(model) / "run"
    _whole(train(training(config, place, place.crops, run, model, pixels=True)).finished)
    export(run, place.export(model), overwrite=True)


def make_new(model: Model, config: Gain, place: Place) -> None:
    """Make the targets of a base over a copy of the crops, train a new model of them, and export it."""
    cache, run, base = own_crops(model, place), place.folder(model) / "run", base_of(model, config)
    extract(_extraction(place, cache, base=str(place.export(base)), name=SET, views=model.views))
    # a seed of its own, as rounds take one: with its base's, it would begin as its base began
    recipe = training(config, place, cache, run, model, target=(SET,), seed=1 + SEEDS * model.seed)
    _whole(train(recipe).finished)
    export(run, place.export(model), overwrite=True)


def make_rounds(model: Model, config: Gain, place: Place) -> None:
    """Train from pixels, then as many rounds as there are, weights continued; the last one's export is the model."""
    cache, out = own_crops(model, place), place.folder(model) / "rounds"
    summary = rounds(
        RoundsConfig(
            train=training(config, place, cache, out, model),
            extract=_extraction(place, cache),
            pixels=True,
            rounds=config.rounds,
            start="previous",
        )
    )
    _whole(summary.finished)
    shutil.copytree(out / summary.rounds[-1]["export"], place.export(model), dirs_exist_ok=True)


def own_crops(model: Model, place: Place) -> Path:
    """Return a model's own copy of the crops: two processes may not add target sets to one cache."""
    cache = place.folder(model) / "cache"
    if not cache.exists():
        draft = cache.with_name("copying")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(place.crops, draft)
        draft.rename(cache)
    return cache


def _extraction(place: Place, cache: Path, **more: Any) -> ExtractConfig:
    how: dict[str, Any] = {"device": place.device, "threads": place.cpu_threads, "workers": place.workers}
    return ExtractConfig(cache=str(cache), batch_size=BATCH, **how, **more)


def _whole(finished: bool) -> None:
    if not finished:
        raise Stopped


def judge_by_valid(model: Model, config: Gain, place: Place) -> dict[str, Any]:
    """Fine-tune on all labels and probe; judged on the validation part."""
    run = tune(model, config, place, tenth=False)
    found = finetune(run)
    _whole(found.finished)
    return {"fine-tuned": found.last["test_top1"]} | frozen(model, config, place, photos.VALID)


def judge_by_test(model: Model, config: Gain, place: Place) -> dict[str, Any]:
    """Fine-tune on all labels and on a tenth, and probe; judged on the test photos.

    Of the fine-tuned models, which test photo is classified correctly, as "0" and "1" in the order of the shards.
    """
    found: dict[str, Any] = {}
    for name, tenth in (("fine-tuned", False), ("fine-tuned, 10 %", True)):
        run = tune(model, config, place, tenth=tenth)
        _whole(finetune(run).finished)
        right = hits(Path(run.out), place)
        found |= {name: float(right.mean()), f"{name}, hits": "".join(right.astype(np.uint8).astype(str))}
    return found | frozen(model, config, place, photos.TEST)


def judged_as(model: Model, config: Gain, place: Place) -> str:
    """Return what the judging programs load: the export, or random weights of the shape of one."""
    if model.kind == UNTRAINED:
        return f"random:{place.export(base_of(model, config))}"
    return str(place.export(model))


def tune(model: Model, config: Gain, place: Place, *, tenth: bool) -> FinetuneConfig:
    """Return the recipe of every fine-tuning. The photos it watches are those of the validation part, never others."""
    epochs = config.tenth_epochs if tenth else config.tune_epochs
    labelled = place.photos / (photos.TENTH if tenth else photos.LEARN)
    return FinetuneConfig(
        model=judged_as(model, config, place),
        train=str(labelled),
        test=str(place.photos / photos.VALID),
        out=str(place.folder(model) / ("tuned-tenth" if tenth else "tuned")),
        recipe="small",
        auto_augment="none",
        crop_scale=(0.35, 1.0),
        epochs=epochs,
        batch_size=config.tune_batch,
        base_lr=config.tune_lr,
        judge_every=epochs,
        save_every=float(epochs),
        seed=model.seed,
        device=place.device,
        threads=place.cpu_threads,
        workers=place.workers,
    )


@torch.no_grad()
def hits(run: Path, place: Place) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return (test photos,) bool: whether a fine-tuned model's first guess is right."""
    compute = resolve_compute(place.device, "auto")
    model: Any = tuned_model(run).to(compute.device)
    index = index_photos(open_source(str(place.photos / photos.TEST)).with_labels())
    transform = evaluation_transform(model.input_size, model.mean, model.std)
    reader = EvaluationReader(index, transform, batch_size=BATCH, workers=place.workers)
    found = []
    for host in reader.once():
        batch = host.to(compute.device)
        with compute.autocast():
            logits = model(batch.images)
        found.append((logits.argmax(dim=1) == batch.labels).cpu().numpy())
    return np.concatenate(found)


def frozen(model: Model, config: Gain, place: Place, part: str) -> dict[str, float]:
    """Return kNN and linear accuracy of the frozen model."""
    found = probe(
        ProbeConfig(
            model=judged_as(model, config, place),
            train=str(place.photos / photos.LEARN),
            test=str(place.photos / part),
            l2=1e-3,
            device=place.device,
            workers=place.workers,
            batch_size=BATCH,
        )
    )
    return {"kNN": found.knn, "linear": found.linear}


def main(out: str, name: str) -> int:
    """Do one job of a folder that `benchmarks.gain` prepared."""
    folder = Path(out)
    settings = json.loads((folder / SETTINGS).read_text())
    config = Gain.read(settings["config"])
    place = Place(folder, **json.loads((folder / "place.json").read_text()))
    torch.set_num_threads(place.threads)
    head, _, what = name.rpartition(".")
    job = Job(Model.named(head), what)
    begin = time.monotonic()
    try:
        found = perform(job, config, place)
    except Stopped:
        return 3
    found["seconds"] = time.monotonic() - begin
    write_atomically(place.result(name), json.dumps(found).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
