"""The lines of `benchmarks.fidelity`: one is written when a run is finished, and a run that has one is not repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from pathlib import Path
from typing import Any

from benchmarks.fidelity import runs as fidelity_runs
from benchmarks.fidelity.plan import Fidelity, Job
from benchmarks.fidelity.runs import Place
from tec_cache.cache.identity import require_same
from tec_cache.store.files import write_atomically


def require_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder of results, or refuse to mix them with others."""
    settings = json.loads(json.dumps(settings))
    if path.exists():
        stored = json.loads(path.read_text())
        require_same(stored, settings, what="the results", where=str(path), todo="name another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(settings, indent=2).encode() + b"\n")


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs; a line that a kill cut in half is none."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def run_missing(
    jobs: Iterable[Job], config: Fidelity, place: Place, pool: Executor, say: Callable[[str], None] = print
) -> None:
    """Perform every job that has no line yet, and append one as each is finished.

    After a failure nothing new is begun; what is under way is finished and recorded, then the failure is raised.
    """
    done = read_results(place.results)
    write_atomically(place.results, "".join(json.dumps(line) + "\n" for line in done).encode())
    there = {line["run"] for line in done}
    missing = [job for job in jobs if job.name not in there]
    under_way = {pool.submit(fidelity_runs.perform, job, config, place) for job in missing}
    failure: BaseException | None = None
    number = 0
    try:
        with place.results.open("a", buffering=1) as file:
            while under_way:
                finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    if error := future.exception():
                        failure = failure or error
                        under_way = {other for other in under_way if not other.cancel()}
                    elif (line := future.result()) is not None:
                        number += 1
                        file.write(json.dumps(line) + "\n")
                        say(f"{number} of {len(missing)}: {spoken(line)}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failure is not None:
        raise failure


def spoken(line: dict[str, Any]) -> str:
    """Write a finished run for the terminal."""
    loss = f"loss {line['loss']:.4f}, " if "loss" in line else ""
    return f"{line['run']:20s} {loss}kNN {line['knn']:.1%}, linear {line['linear']:.1%}, {line['seconds']:.0f} s"
