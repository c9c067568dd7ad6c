"""Kill `tec-cache rounds` at random moments, start it again, and compare what it leaves with an undisturbed chain.

Each start is a process of its own, ended by SIGKILL. Round 0 learns from pixels, so no base is needed. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from pipelines.extract import extract
from tec_cache.config import ExtractConfig
from tec_cache.run.checkpoint import load_checkpoint
from tec_cache.run.layout import checkpoints
from tec_cache.run.settings import load_settings, run_identity
from tests.conftest import files_below

CALLS = ("extract", "train", "export", "rm")
STUDENT = {"embed_dim": 96, "depth": 6, "num_heads": 3, "patch_size": 4}
MOST_CHAINS = 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", help="small photos, as for tec-cache extract; 32 pixels are taken of each")
    parser.add_argument("--limit", type=int, default=512, help="photos")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--start", default="random")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        views = {"size": 32, "grid": 8, "views": 2, "group_size": 128, "limit": args.limit}
        extract(ExtractConfig(input=args.photos, cache=str(folder / "crops"), views_only=True, **views))
        command = words(folder / "here", args)
        seconds, undisturbed = whole_chain(folder, command)
        met, chains, different = kill(folder, command, seconds, args.kills, undisturbed)
    print(f"{describe('cpu')}\n")
    print(f"{args.rounds} rounds of {args.limit} photos undisturbed: {seconds:.0f} s, {len(undisturbed)} results")
    print("| killed in | " + " | ".join(f"round {n}" for n in range(args.rounds)) + " |")
    print("|---|" + "---|" * args.rounds)
    for call in CALLS:
        print(f"| {call} | " + " | ".join(str(met[n, call]) for n in range(args.rounds)) + " |")
    print(f"\n{sum(met.values())} kills in {chains} chains; results that differ: {different or 'none'}")


def words(folder: Path, args: argparse.Namespace) -> list[str]:
    """Return the command that makes a chain."""
    student = [word for name, value in STUDENT.items() for word in ("--student-arg", f"{name}={value}")]
    sizes = ["--decoder-width", "96", "--batch-size", "64", "--save-minutes", "0", "--log-every", "1", "--k", "9"]
    chain = ["--rounds", str(args.rounds), "--epochs", str(args.epochs), "--start", args.start, "--pixels"]
    places = ["--cache", str(folder / "cache"), "--out", str(folder / "chain"), "--device", "cpu", "--threads", "1"]
    student = ["--student", "vit_tiny_patch16_224", *student]
    return [sys.executable, "-m", "cli", "rounds", *places, *chain, *student, *sizes, "--quiet"]


def begin(folder: Path) -> Path:
    """Lay the crops where every chain begins; paths are the same for all, because they stand in what is written."""
    here = folder / "here"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(folder / "crops", here / "cache")
    return here


def whole_chain(folder: Path, command: list[str]) -> tuple[float, dict[str, Any]]:
    """Return the seconds of an undisturbed chain, and its results."""
    here, start = begin(folder), time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start, results(here)


def results(here: Path) -> dict[str, Any]:
    """Return cache and exports byte by byte, the runs' last weights, and rounds.json but for its hours."""
    found: dict[str, Any] = {f"cache/{n}": d for n, d in files_below(here / "cache").items() if n != ".lock"}
    said = json.loads((here / "chain" / "rounds.json").read_text())
    for one in said["rounds"]:
        del one["hours"]
        run, export = here / "chain" / one["run"], here / "chain" / one["export"]
        found |= {f"{one['export']}/{name}": data for name, data in files_below(export).items()}
        state = load_checkpoint(checkpoints(run)[-1], run_identity(load_settings(run)))
        found |= {f"{one['run']}/{name}": value.numpy().tobytes() for name, value in state["model"].items()}
    return found | {"rounds.json": said}


def kill(
    folder: Path, command: list[str], seconds: float, kills: int, undisturbed: dict[str, Any]
) -> tuple[Counter[tuple[int, str]], int, list[str]]:
    """Kill and start again until there were so many kills; return where they met the chains, and what differs."""
    draw, met, different = random.Random(0), Counter[tuple[int, str]](), list[str]()
    chains = 0
    while sum(met.values()) < kills and chains < MOST_CHAINS:
        here, chains = begin(folder), chains + 1
        while True:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            at_work(here, process)
            try:
                left = sum(met.values()) < kills
                process.wait(draw.uniform(0, seconds / 4) if left else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                met[where(here, len(undisturbed["rounds.json"]["rounds"]))] += 1
        if process.returncode:
            raise SystemExit(f"the chain ended with {process.returncode}")
        found = results(here)
        different += sorted(name for name in found.keys() | undisturbed if found.get(name) != undisturbed.get(name))
    return met, chains, different


def at_work(here: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a command writes rounds.json, as each does before its first call: importing torch takes seconds."""
    journal = here / "chain" / "rounds.json"
    before = journal.stat().st_mtime_ns if journal.exists() else 0
    while process.poll() is None and (not journal.exists() or journal.stat().st_mtime_ns == before):
        time.sleep(0.005)


def where(here: Path, rounds: int) -> tuple[int, str]:
    """Return the round and the call in which a kill met the chain: the first that is not written down, or the last."""
    done = json.loads((here / "chain" / "rounds.json").read_text())["done"]
    calls = [(number, call) for number in range(rounds) for call in CALLS if number or call != "extract"]
    return calls[min(len(done), len(calls) - 1)]


if __name__ == "__main__":
    main()
