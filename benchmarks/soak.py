"""Kill extractions at random moments, start them again, and compare the finished caches with an undisturbed one.

Once with one process, once with two as torchrun starts them. After the random kills, stages that none of them hit
are waited for and killed as they begin; the table says which is which. Prints Markdown.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pipelines.extract import extract
from tec_cache.config import ExtractConfig
from tests import forked
from tests.conftest import files_below, tiny_config, write_shards, write_tiny_base
from tests.faults import Watch

STAGES = [
    "start",
    "clearing up",
    "preparing",
    "cache.json",
    "asked record",
    "views cut",
    "views draft",
    "views payload",
    "views record",
    "source record",
    "content record",
    "target.json",
    "fit",
    "codec payload",
    "codec record",
    "targets compute",
    "targets draft",
    "targets payload",
    "targets record",
    "summary",
]
MOST_AIMED = 150
"""Further kills at most, to hit the stages that last too short for the random ones."""


class Board:
    """A byte of memory shared with a job, in which it says where it is."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"\xff")
        self.path = path
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 1)

    @property
    def stage(self) -> str | None:
        """Return the stage, None before the job has begun."""
        number = self.memory[0]
        return None if number == 255 else STAGES[number]


def job(config: ExtractConfig, board: Path) -> None:
    """Extract, telling each stage to the board."""
    with board.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 1)

    def enter(phase: str) -> None:
        memory[0] = STAGES.index(phase)

    Watch(Path(config.cache), enter=enter)
    enter("start")
    extract(config)


class Soak:
    """Kills of one kind of job, and what came of them."""

    def __init__(self, folder: Path, config: ExtractConfig, processes: int, seed: int) -> None:
        self.folder, self.config, self.processes = folder, config, processes
        self.random = random.Random(seed)
        self.hit: dict[str, Counter[str]] = {"random": Counter(), "aimed": Counter()}
        self.finished = self.different = 0
        self.seconds = 1.0

    @property
    def left(self) -> set[str]:
        """Stages that no kill has hit."""
        return set(STAGES) - set(self.hit["random"]) - set(self.hit["aimed"])

    def start(self) -> list[tuple[Any, Board]]:
        """Start the processes of a job."""
        jobs = []
        for rank in range(self.processes):
            board = Board(self.folder / f"board-{self.processes}-{rank}")
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
            jobs.append((forked.start(job, self.config, board.path, environment=environment), board))
        for process, board in jobs:
            while board.stage is None and process.is_alive():
                time.sleep(0.001)
        return jobs

    def undisturbed(self) -> dict[str, bytes]:
        """Extract without kills; return the cache's files, which are removed, and note how long it takes."""
        jobs, begin = self.start(), time.monotonic()
        self._end(jobs)
        self.seconds = time.monotonic() - begin
        return self._taken()

    def run(self, kills: int, whole: dict[str, bytes]) -> None:
        """Kill so often, then aim at what was not hit; start anew whenever an extraction is finished."""
        while (done := self.hit["random"].total()) < kills or (self.left and self.hit["aimed"].total() < MOST_AIMED):
            jobs = self.start()
            if done < kills:
                time.sleep(self.random.uniform(0, self.seconds))
                self._kill(jobs, "random")
            else:
                wanted = self.left
                while any(p.is_alive() for p, _ in jobs) and not any(board.stage in wanted for _, board in jobs):
                    pass
                self._kill([pair for pair in jobs if pair[1].stage in wanted] or jobs[:1], "aimed")
            if self._end(jobs):
                self._compare(whole)
        self._end(self.start())
        self._compare(whole)

    def _kill(self, jobs: list[tuple[Any, Board]], how: str) -> None:
        """Kill all processes of a job or, half the time, one: the others go on to their end."""
        victims = jobs if self.random.random() < 0.5 else [self.random.choice(jobs)]
        for process, board in victims:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                if process.exitcode == -signal.SIGKILL and board.stage is not None:
                    self.hit[how][board.stage] += 1

    def _end(self, jobs: list[tuple[Any, Board]]) -> bool:
        """Wait for all processes; say whether all came to their end."""
        for process, _ in jobs:
            process.join()
        codes = {process.exitcode for process, _ in jobs}
        if codes - {0, -signal.SIGKILL}:
            raise SystemExit(f"an extraction failed by itself: exit codes {codes}, cache {self.config.cache}")
        return codes == {0}

    def _compare(self, whole: dict[str, bytes]) -> None:
        self.finished += 1
        self.different += self._taken() != whole

    def _taken(self) -> dict[str, bytes]:
        """Return the files of the cache, and remove it."""
        cache = Path(self.config.cache)
        found = {name: data for name, data in files_below(cache).items() if name != ".lock"}
        cache.rename(cache.with_name(f"done-{self.processes}-{time.monotonic_ns()}"))
        return found


def table(soaks: list[Soak]) -> str:
    """Return the kills by stage as a Markdown table."""
    heads = [f"{s.processes} process{'es' if s.processes > 1 else ''}, {how}" for s in soaks for how in s.hit]
    lines = ["| killed in | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for stage in STAGES:
        lines.append(f"| {stage} | " + " | ".join(str(s.hit[how][stage]) for s in soaks for how in s.hit) + " |")
    totals = " | ".join(str(s.hit[how].total()) for s in soaks for how in s.hit)
    return "\n".join([*lines, f"| **all** | {totals} |"])


def main() -> None:
    """Run both kinds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="random kills of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quality", default="default")
    args = parser.parse_args()
    from benchmarks.machine import describe

    print(describe("cpu"), f"seed {args.seed}, quality {args.quality}", sep="\n", end="\n\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        photos, base = write_shards(folder / "photos", [24, 9, 16]), write_tiny_base(folder / "base")
        settings = {"group_size": 8, "quality": args.quality, "fit_views": 24, "workers": 1}
        soaks, whole = [], {}
        for processes in (1, 2):
            config = tiny_config(photos, folder / f"cache-{processes}", base, **settings)
            soak = Soak(folder, config, processes, args.seed)
            for _ in range(2):  # the second tells how long it takes
                files = soak.undisturbed()
                whole = whole or files
                if files != whole:
                    raise SystemExit("two undisturbed extractions differ")
            begin = time.monotonic()
            soak.run(args.kills, whole)
            soaks.append(soak)
            kills, seconds = sum(hit.total() for hit in soak.hit.values()), time.monotonic() - begin
            print(
                f"{processes} process{'es' if processes > 1 else ''}: {kills} kills in {seconds:.0f} s, "
                f"{soak.finished} extractions finished after kills, {soak.different} of them different from the "
                f"undisturbed one ({len(whole)} files); stages never hit: {', '.join(sorted(soak.left)) or 'none'}",
                flush=True,
            )
    print("\n" + table(soaks))
    raise SystemExit(any(soak.different or soak.left for soak in soaks))


if __name__ == "__main__":
    main()
