#!/usr/bin/env python3
"""Is a new model better than its base, and better than the same computing spent on the base?

    python -m benchmarks.gain 'cifar10-train-*.tar.gz' --test 'cifar10-test-*.tar.gz'
    python -m benchmarks.gain 'cifar10-train-*.tar.gz' --test 'cifar10-test-*.tar.gz' --config gpu --minutes 9
    python -m benchmarks.gain --tables gain-out --markdown docs/gain.md --plot docs/gain.png
    python -m benchmarks.gain --config imagenet                the paper's own table, as commands

Shards of labelled 32-pixel photos, CIFAR-10 for instance. What is compared, and by what rule it is chosen where, is
written to OUT/declared.json before anything is trained. First the base's own curve is made, judged on photos kept back
of those to learn from; then all arms, at the epochs where that curve has flattened, judged on the test photos.

The same command goes on where it was stopped or killed. `cpu` is made for about 75 minutes on two idle cores, `gpu`
for one GPU with 16 cores; --minutes stops it after a while.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.fidelity.report import put_between_marks
from benchmarks.fidelity.results import require_same_settings
from benchmarks.gain import photos
from benchmarks.gain.imagenet import commands
from benchmarks.gain.jobs import SETTINGS, Place
from benchmarks.gain.plan import (
    ARMS,
    CHOICE,
    CONFIGS,
    QUESTIONS,
    SIZE,
    Gain,
    arm_jobs,
    chosen_epochs,
    curve_jobs,
)
from benchmarks.gain.report import Found, draw, markdown, validated
from benchmarks.gain.running import Failed, run_jobs
from benchmarks.machine import describe
from pipelines.extract import extract
from tec_cache.config import ExtractConfig
from tec_cache.device import available_cores, resolve_compute

MACHINE = "machine.txt"
"""What the last command ran on, and that command."""


def main(argv: list[str] | None = None) -> int:
    """Do what is missing; print the tables when all of it is there. Return 3 where there is more to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", nargs="?", help="shards of labelled photos to learn from")
    parser.add_argument("--test", help="shards of labelled photos to judge on")
    parser.add_argument("--config", choices=[*CONFIGS, "imagenet"], default="cpu")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="another value of the config")
    parser.add_argument("--out", default="gain-out", help="folder of photos, caches, runs and results")
    parser.add_argument("--jobs", type=int, help="processes at once; default: one a core on a CPU, 8 on a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=1e6, help="of this command")
    parser.add_argument("--tables", metavar="OUT", help="the tables of a folder where all is done; nothing is run")
    parser.add_argument("--markdown", help="write the tables between the marks of this file")
    parser.add_argument("--plot", help="write a picture to this file")
    args = parser.parse_args(argv)
    if args.config == "imagenet":
        print(commands())
        return 0
    if args.tables:
        show(args.config, Path(args.tables), args.markdown, args.plot)
        return 0
    if args.train is None or args.test is None:
        parser.error("name the shards to learn from, and --test")
    config = replace(CONFIGS[args.config], **dict(map(_value, args.set)))
    device = str(resolve_compute(args.device, "auto").device)
    machine = describe(device)
    print(machine, flush=True)
    jobs = args.jobs or (available_cores() if device == "cpu" else 8)
    workers = 1 if device == "cpu" else 2
    place = Place(Path(args.out), device, max(1, available_cores() // jobs), workers)
    place.out.mkdir(parents=True, exist_ok=True)
    require_same_settings(place.out / SETTINGS, {"config": asdict(config)})
    (place.out / MACHINE).write_text(machine)
    try:
        whole = measure(config, args.train, args.test, place, jobs, time.monotonic() + 60 * args.minutes)
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    if not whole:
        print("there is more to do: give the same command again")
        return 3
    show(args.config, place.out, args.markdown, args.plot)
    return 0


def show(name: str, out: Path, document: str | None, plot: str | None) -> None:
    """Print the tables of a folder where all is done; write them into a document, and draw them."""
    found = Found.read(out)
    tables = markdown(name, found, (out / MACHINE).read_text())
    print("\n" + tables)
    if document:
        put_between_marks(Path(document), tables, (f"<!-- {name}: begin -->", f"<!-- {name}: end -->"))
    if plot:
        draw(found, plot)


def _value(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    read = json.loads(value)
    return name, tuple(read) if isinstance(read, list) else read


def measure(config: Gain, train: str, test: str, place: Place, jobs: int, deadline: float) -> bool:
    """Declare what is asked, make and judge the base's curve, choose, then all arms; False where time was over."""
    (place.out / "place.json").write_text(json.dumps({k: v for k, v in vars(place).items() if k != "out"}))
    declared = {"arms": ARMS, "questions": QUESTIONS, "choice": CHOICE, "curve": config.curve(), "at": config.at}
    (place.out / "declared.json").write_text(json.dumps(declared, indent=2) + "\n")
    photos.cut(config, train, test, place.photos)
    extract(
        ExtractConfig(
            input=str(place.photos / photos.LEARN),
            cache=str(place.crops),
            views=max(config.views, *config.more_views, 1),
            size=SIZE,
            grid=SIZE // config.patch,
            views_only=True,
        )
    )
    place.result("x").parent.mkdir(exist_ok=True)
    curve = curve_jobs(config)
    settled = [] if config.at is None else arm_jobs(config, config.epochs * config.at)
    if not run_jobs([*settled, *curve], config, place, jobs, deadline, _say):
        return False
    epochs, flat = chosen_epochs(config, validated(config, place.out))
    print(f"E = {epochs} epochs; the curve has{'' if flat else ' not'} flattened there", flush=True)
    return run_jobs(arm_jobs(config, epochs), config, place, jobs, deadline, _say)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
