"""Parts about what comes before the student: decoding and encoding targets, the loader, stage one."""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.extract import KINDS, prepare, write_tiny
from benchmarks.extract import measure as measure_extract
from benchmarks.gpu.data import Data
from benchmarks.launches import count_kernels, count_operations
from tec_cache.cache.opening import open_cache
from tec_cache.device import resolve_compute
from tec_cache.loader import Batch, Loader
from tec_cache.run.feed import on_device

Rows = list[dict[str, Any]]


def kernels(data: Data) -> Rows:
    """Time decoding and encoding a batch's targets on the device, and count what they launch."""
    rows: Rows = []
    for model in data.size.models:
        cache = open_cache(data.cache(model))
        stored, device = cache["t"], resolve_compute(data.size.device, "auto").device
        loader: Loader[Batch] = Loader(cache, stored, batch_size=data.size.decoded, pixel_sizes=(cache.size,))
        (codes,) = [batch.to(device).codes for batch in loader.batches(0, 1)]
        targets = stored.decode(codes)
        work: dict[str, Callable[[], object]] = {
            "decode": lambda stored=stored, codes=codes: stored.decode(codes),
            "encode, and fetch the codes": lambda stored=stored, targets=targets: stored.codec.encode(
                targets, stored.spec
            ),
        }
        for name, run in work.items():
            rows.append(
                {"model": model, "views": data.size.decoded, "work": name, "ms": 1000 * seconds(run, device)}
                | {"operations": count_operations(run), "kernels": count_kernels(run, device)}
            )
    return rows


def seconds(work: Callable[[], object], device: torch.device, *, times: int = 20) -> float:
    """Return the median seconds of some work of its own, the device waited for."""
    found = []
    for _ in range(times + 3):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return statistics.median(found[3:])


def loading(data: Data) -> Rows:
    """Count views per second that arrive on the device, with a consumer that does nothing."""
    cache = open_cache(data.cache(data.size.main))
    device = resolve_compute(data.size.device, "auto").device
    rows: Rows = []
    for workers in data.size.workers:
        loader: Loader[Batch] = Loader(
            cache,
            cache["t"],
            batch_size=data.size.loader_batch,
            pixel_sizes=(cache.size,),
            workers=workers,
            pin_memory=device.type == "cuda",
        )
        batches = on_device(loader.batches(0, 1_000_000), device)
        for _ in range(4):  # begins the threads, and empties what they had ready
            next(batches)
        views, begin, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < data.size.loader_seconds:
            views += len(next(batches))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent, busy = time.perf_counter() - begin, time.process_time() - cpu
        batches.close()
        rows.append({"workers": workers, "views/s": views / spent, "CPU ms/view": 1000 * busy / views})
    first = rows[0]["views/s"]
    return [row | {"times one worker": row["views/s"] / first} for row in rows]


def stage_one(data: Data, *, costly: bool) -> Rows:
    """Time `extract` beside its image work, base and coding alone. costly: with a real base, else one that is free."""
    size, folder = data.size, data.folder / "stage-one"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = size.models[size.main].architecture
    if costly:
        base: dict[str, Any] = {"base": data.base(size.main), "size": size.size, "grid": size.grid}
    else:
        model, base = "a base that costs nothing", {"base": write_tiny(folder / "tiny"), "last_layers": 1, "grid": 7}
    args = argparse.Namespace(
        data=data.photos(),
        views=size.stage_views[0 if costly else 1],
        quality="default",
        device=size.device,
        rounds=size.rounds,
        base_views=size.stage_photos,
    )
    found = measure_extract(prepare(model, args, base | {"limit": size.stage_photos}, folder / "case"), args)
    shutil.rmtree(folder)
    return [
        {"base": model, "views of a photo": args.views, "work": work, "ms/view": 1000 * found[work]}
        | {"views/s": 1 / found[work], "extract reaches": found[work] / found["extract"]}
        for work in KINDS
    ]
