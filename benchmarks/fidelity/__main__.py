#!/usr/bin/env python3
"""Does the cache cost accuracy? New models from few views and lossy targets, judged against the base in the loop.

    python -m benchmarks.fidelity 'cifar10-train-*.tar.gz' --test 'cifar10-test-*.tar.gz'
    python -m benchmarks.fidelity 'cifar10-train-*.tar.gz' --test 'cifar10-test-*.tar.gz' --config gpu
    python -m benchmarks.fidelity ... --markdown docs/fidelity.md --plot docs/fidelity.png

Shards of labelled 32-pixel photos, CIFAR-10 for instance. A small ViT learns from pixels (round zero) and is the base
of all; new models of its size learn from its targets: with the base in the loop, and from caches of four qualities and
1 to 8 views or a new view in every epoch. They are judged by the held-out loss against the exact target of test
photos, k nearest neighbours and a linear probe, a few seeds each. Between two cells of one seed nothing differs but
what the cell's name says: initial weights, order of photos, masks and number of steps are the same.

Each finished run is a line of OUT/results.jsonl, and the same command goes on where it was stopped or killed. `cpu`
is made for about 20 minutes on two idle cores; `gpu` has not been run yet: it needs about 60 GB of disk (computed).
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.fidelity.plan import CONFIGS, QUALITIES, Fidelity, jobs_of
from benchmarks.fidelity.report import draw, markdown, put_between_marks
from benchmarks.fidelity.results import read_results, require_same_settings, run_missing
from benchmarks.fidelity.runs import Place, prepare, start_worker
from benchmarks.machine import describe
from pipelines.info import info
from tec_cache.device import available_cores, resolve_compute


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="shards of labelled photos to learn from")
    parser.add_argument("--test", required=True, help="shards of labelled photos to judge on")
    parser.add_argument("--config", choices=list(CONFIGS), default="cpu")
    parser.add_argument("--out", default="fidelity-out", help="folder of caches, runs and results")
    parser.add_argument("--jobs", type=int, help="processes; default: one a core on a CPU, 1 on a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--markdown", help="write the tables between the marks of this file")
    parser.add_argument("--plot", help="write a picture of the loss differences to this file")
    args = parser.parse_args()
    device = str(resolve_compute(args.device, "auto").device)
    machine = describe(device)
    print(machine)
    place = Place(args.train, args.test, args.out, device)
    jobs = args.jobs or (available_cores() if device == "cpu" else 1)
    config = CONFIGS[args.config]
    measure(config, place, jobs)
    results = read_results(place.results)
    sizes = {name: info(place.cache)["targets"][name] for name in QUALITIES}
    tables = markdown(args.config, config, results, sizes, machine)
    print("\n" + tables)
    if args.markdown:
        put_between_marks(Path(args.markdown), tables)
    if args.plot:
        draw(config, results, args.plot)


def measure(config: Fidelity, place: Place, jobs: int) -> None:
    """Make caches and base, then every run that has no line yet."""
    require_same_settings(Path(place.out) / "settings.json", asdict(config))
    begin = time.monotonic()
    # models this small are trained about twice as fast by two processes of one thread as by one of two
    threads = max(1, available_cores() // jobs)
    torch.set_num_threads(threads)
    prepare(config, place)
    print(f"base and caches: {time.monotonic() - begin:.0f} s", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(threads,)) as pool:
        run_missing(jobs_of(config), config, place, pool)
    print(f"all: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
