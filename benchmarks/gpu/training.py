"""Parts about stage two: fidelity of precisions, seconds of a step, memory, ranks, checkpoints."""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.agreement import agreement, taken
from benchmarks.gpu.data import Data
from benchmarks.step.kinds import Kind, Setting, kind, measure, stretch, three_kinds
from pipelines.train import train
from tec_cache.errors import TecCacheError
from tec_cache.run.saving import Saver

Rows = list[dict[str, Any]]


def fidelity(data: Data) -> Rows:
    """Compare losses and gradients of one batch with those of float32, eager: the same weights, masks and targets."""
    rows: Rows = []
    for model in data.size.models:
        reference = None
        for precision, compiled in (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)):
            more = {"precision": precision, "compile": compiled}
            one = kind(data.setting(model, data.size.fidelity_batch, **more))
            batches = one.task.batches(0, 1)
            (batch,) = [batch.to(one.loop.compute.device) for batch in batches]
            step = taken(one.task.module, one.loop.losses(batch))
            del one
            free()
            if reference is None:
                reference = step
                continue
            found = agreement(reference, step)
            name, lowest = found.lowest
            rows.append(
                {"model": model, "precision": precision, "compiled": compiled, "gradient cosine": found.cosine}
                | {f"{loss}: relative difference": value for loss, value in found.losses.items()}
                | {"lowest cosine of a parameter": lowest, "which": name}
            )
    return rows


def steps(data: Data, model: str, *, compiled: bool) -> Rows:
    """Time a step with targets from the cache, from the base in the loop, and of the student alone."""
    rows: Rows = []
    for batch in data.size.compiled if compiled else data.size.micro_batches:
        try:
            rows += _steps(data, model, batch, compiled)
        except TecCacheError as error:
            rows.append({"micro-batch": batch, "failed": str(error)})
        free()
    return rows


def _steps(data: Data, model: str, batch: int, compiled: bool) -> Rows:
    kinds = three_kinds(data.setting(model, batch, compile=compiled), data.online(model))
    rounds = measure(kinds, data.size.steps, data.size.rounds)
    rows: Rows = []
    for name in kinds:
        median = statistics.median(found[name] for found in rounds)
        shares = [found["limit"] / found[name] for found in rounds]
        rows.append(
            {"micro-batch": batch, "targets": name, "s/step": median, "images/s": batch / median}
            | {"of the limit": statistics.median(shares), "lowest": min(shares), "highest": max(shares)}
            | {"online / this": statistics.median(found["online"] / found[name] for found in rounds)}
        )
    return rows


def memory(data: Data, model: str) -> Rows:
    """Find the allocator's peak of a step of each micro-batch, and try the micro-batch that is the default."""
    default = replace(data.setting(model, data.size.default_batch).config, steps=1)
    rows: Rows = []
    for batch in (*data.size.tried, None):
        free()
        row: dict[str, Any] = {"micro-batch": batch or "the default"}
        try:
            if batch is None:
                with TemporaryDirectory() as run:
                    row["rows"] = train(replace(default, out=run)).micro_batch
            else:
                row["rows"] = batch
                one_step(data.setting(model, batch))
            row["peak, GB"] = peak()
        except TecCacheError as error:
            row["failed"] = str(error)
        rows.append(row)
    return rows


def one_step(setting: Setting) -> None:
    """Take two steps: the second one has the optimizer's state from its beginning."""
    one = kind(setting, ready=True)
    one.step()
    one.step()


def checkpoints(data: Data, model: str) -> Rows:
    """Time steps with and without a checkpoint being written meanwhile, and how long the training stands for it."""
    size = data.size
    one = kind(data.setting(model, size.micro_batches[-2]), ready=True)
    run = made_empty(data.folder / "saving")
    plain, saving, standing, whole = [], [], [], []
    with Saver(run, "0" * 64) as saver:
        stretch(one, 1)
        saver.save(1, one.loop.state())  # takes the pinned memory
        saver.wait()
        for _ in range(size.rounds):
            plain.append(seconds_of(one, 4 * size.steps))
            begin = time.perf_counter()
            saver.save(one.loop.step, one.loop.state())
            standing.append(time.perf_counter() - begin)
            saving.append(seconds_of(one, 4 * size.steps) + standing[-1])
            saver.wait()
            whole.append(time.perf_counter() - begin)
    gigabytes = max(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 1e9
    shutil.rmtree(run)
    return [
        {
            "steps": 4 * size.steps,
            "GB": gigabytes,
            "s without": statistics.median(plain),
            "s with one": statistics.median(saving),
            "host stands, s": statistics.median(standing),
            "until written, s": statistics.median(whole),
        }
    ]


def seconds_of(one: Kind, steps: int) -> float:
    """Return the seconds in which a training does some steps, the device waited for at the end."""
    begin = time.perf_counter()
    for _ in range(steps):
        one.step()
    if one.loop.compute.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def made_empty(folder: Path) -> Path:
    """Return a folder that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def free() -> None:
    """Give back what is no longer used, and count the peak of memory anew."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float | None:
    """Return the most GB that torch's allocator gave out since `free`; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
