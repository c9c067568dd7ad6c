"""The work of `benchmarks.fidelity`: caches and base once, then one model at a time, trained and judged."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity.plan import BASE, GRID, ONLINE, QUALITIES, SIZE, UNTRAINED, Fidelity, Job
from pipelines.export import export, trained_student
from pipelines.extract import extract
from pipelines.probe import probe
from pipelines.train import prepare_student, train
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.config import ExtractConfig, ProbeConfig, TrainConfig
from tec_cache.device import resolve_compute
from tec_cache.errors import TecCacheError
from tec_cache.loader import Batch, Loader
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.run.export import write_export
from tec_cache.student.model import Student
from tec_cache.tasks.pretrain import noise_of

STUDENT = "vit_tiny_patch16_224"
HELD_OUT = "exact"
"""Name and quality of the target set of the test photos."""


@dataclass(frozen=True)
class Place:
    """Where photos come from, and where everything goes."""

    train: str
    test: str
    out: str
    device: str

    @property
    def cache(self) -> str:
        """The cache that all models learn from."""
        return str(Path(self.out) / "cache")

    @property
    def held_out(self) -> str:
        """The cache of the test photos' centre crops."""
        return str(Path(self.out) / "held-out")

    @property
    def base(self) -> str:
        """The export of round zero."""
        return str(Path(self.out) / "base")

    @property
    def results(self) -> Path:
        """One line for each finished run."""
        return Path(self.out) / "results.jsonl"


def prepare(config: Fidelity, place: Place) -> None:
    """Make views, base and target sets, or go on where that was stopped; nothing is made twice."""
    how: dict[str, Any] = {"device": place.device, "threads": torch.get_num_threads()}
    crops: dict[str, Any] = {"size": SIZE, "grid": GRID}
    extract(
        ExtractConfig(
            input=place.train, cache=place.cache, views=config.epochs, limit=config.images, views_only=True, **crops
        )
    )
    if not (Path(place.base) / "config.json").exists():
        zero = str(Path(place.out) / "zero")
        pixels = {"pixels": True, "epochs": config.base_epochs, "mask_ratio": 0.75}
        if not train(training(config, place, zero, seed=0, **pixels), quiet=False).finished:
            raise TecCacheError("round zero was stopped", where=zero, todo="give the same command again, it goes on")
        export(zero, place.base)
    for quality in QUALITIES:
        views = config.epochs if quality in ("exact", "default") else config.quality_views
        extract(ExtractConfig(cache=place.cache, base=place.base, name=quality, quality=quality, views=views, **how))
    extract(
        ExtractConfig(
            input=place.test, cache=place.held_out, views=1, crop="center", limit=config.judged,
            base=place.base, name=HELD_OUT, quality=HELD_OUT, **crops, **how,
        )
    )  # fmt: skip


def training(config: Fidelity, place: Place, out: str, *, seed: int, **changes: Any) -> TrainConfig:
    """Return the recipe of every training; `changes` is what a cell's name says."""
    shape = {"patch_size": SIZE // GRID, "embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    values: dict[str, Any] = {
        "cache": place.cache,
        "out": out,
        "student": STUDENT,
        "student_args": shape,
        "decoder_depth": config.decoder_depth,
        "decoder_width": config.width,
        "decoder_heads": config.heads,
        "mask_ratio": config.mask_ratio,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "base_lr": config.base_lr,
        "seed": seed,
        "device": place.device,
        "threads": torch.get_num_threads(),
        "save_every": max(1.0, config.epochs / 4),
    }
    return TrainConfig(**(values | changes))


def start_worker(threads: int) -> None:
    """Prepare a process of the pool, which ends when its parent does.

    A worker whose parent was killed would go on in a folder that the next start wants for itself.
    """
    torch.set_num_threads(threads)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def perform(job: Job, config: Fidelity, place: Place) -> dict[str, Any] | None:
    """Make one model and judge it; return its line of the results, None if a signal stopped the training."""
    begin = time.monotonic()
    line: dict[str, Any] = {"run": job.name, "kind": job.cell.kind, "views": job.cell.views, "seed": job.seed}
    model = place.base
    if job.cell.kind != BASE:
        folder = Path(place.out) / "runs" / job.name
        model = str(folder / "model")
        make: Callable[..., Student | None] = untrained if job.cell.kind == UNTRAINED else trained
        student = make(job, config, place, folder)
        if student is None:
            return None
        line |= held_out_losses(student, open_cache(place.held_out), config, torch.device(place.device))
    found = probe(
        ProbeConfig(model=model, train=place.train, test=place.test, limit=config.judged, l2=1e-3, device=place.device)
    )
    return line | {"knn": found.knn, "linear": found.linear, "seconds": time.monotonic() - begin}


def trained(job: Job, config: Fidelity, place: Place, folder: Path) -> Student | None:
    """Train a cell's model and export it to FOLDER/model; None where a signal stopped it."""
    kind = {"online": place.base} if job.cell.kind == ONLINE else {"target": job.cell.kind}
    run = folder / "run"
    summary = train(training(config, place, str(run), seed=job.seed, views=job.cell.views, **kind))
    if not summary.finished:
        return None
    export(run, folder / "model", overwrite=True)
    return trained_student(run)[0]


def untrained(job: Job, config: Fidelity, place: Place, folder: Path) -> Student:
    """Return the student that all cells of a seed begin with, exported to FOLDER/model."""
    recipe = training(config, place, str(folder / "run"), seed=job.seed, target="exact")
    compute = resolve_compute(place.device, "auto")
    _, student = prepare_student(recipe, open_cache(place.cache), compute)
    write_export(
        student,
        folder / "model",
        config={},
        encoder_name=recipe.student,
        model_args=recipe.student_args,
        overwrite=True,
    )
    return student


@torch.no_grad()
def held_out_losses(student: Student, cache: Cache, config: Fidelity, device: torch.device) -> dict[str, float]:
    """Return the student's losses against the exact targets of the test photos, in float32.

    The training's own losses, their sum under "loss". Masks and batches are the same for every model; the photos
    that do not fill a batch are left out.
    """
    stored, student = cache[HELD_OUT], student.to(device).eval()
    loader: Loader[Batch] = Loader(cache, stored, batch_size=config.batch_size, pixel_sizes=(cache.size,))
    steps = config.masks * loader.steps_per_epoch
    sums: dict[str, float] = {}
    for host_batch in loader.batches(0, steps):
        batch = host_batch.to(device)
        images = batch.images(cache.size, IMAGENET_MEAN, IMAGENET_STD)
        noise = noise_of(batch, cache.grid**2, seed=0).to(device)
        losses = student(images, stored.decode(batch.codes[stored.name]), noise=noise)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) / steps
    return {"loss": sum(sums.values())} | sums
