"""The benchmark of fidelity: its statistics, what it says of them, its resumption, and its held-out loss."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.fidelity import runs as fidelity_runs
from benchmarks.fidelity.plan import CPU, Cell, Fidelity, Job, jobs_of, quality_cells, view_cells
from benchmarks.fidelity.report import (
    MARKS,
    MEASURES,
    UNRESOLVED,
    Difference,
    draw,
    markdown,
    paired_difference,
    put_between_marks,
)
from benchmarks.fidelity.results import read_results, require_same_settings, run_missing
from benchmarks.fidelity.runs import HELD_OUT, Place, held_out_losses, perform, prepare
from pipelines.train import prepare_student
from tec_cache.cache.opening import open_cache
from tec_cache.config import TrainConfig
from tec_cache.device import resolve_compute
from tec_cache.distributed import Ranks
from tec_cache.errors import IdentityError, TecCacheError
from tec_cache.run.loop import Loop
from tec_cache.run.metrics import read_metrics
from tec_cache.tasks.pretrain import Pretrain
from tests.conftest import write_shards

TINY = replace(
    CPU, images=48, judged=33, width=24, heads=2, epochs=2, base_epochs=1, batch_size=16, seeds=2, views=(1,),
    quality_views=1,
)  # fmt: skip
LOSS, KNN = MEASURES[0], MEASURES[3]


def test_paired_difference_is_the_t_interval_of_the_differences() -> None:
    ours, reference = {1: 1.10, 2: 1.30, 3: 1.70}, {1: 1.00, 2: 1.25, 3: 1.60}
    found = paired_difference(ours, reference)
    # differences 0.10, 0.05, 0.10: mean 0.25 / 3, deviation 0.0288675, t(0.975, 2) = 4.302653
    assert found is not None
    assert found.mean == pytest.approx(0.25 / 3)
    assert found.half == pytest.approx(4.302653 * 0.0288675 / math.sqrt(3), rel=1e-5)
    low, high = stats.ttest_rel(list(ours.values()), list(reference.values())).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_pairs_are_of_one_seed_and_one_pair_resolves_nothing() -> None:
    found = paired_difference({2: 5.0, 3: 7.0, 9: 100.0}, {3: 6.0, 2: 4.0, 1: 0.0})
    assert found is not None
    assert (found.mean, found.half) == pytest.approx((1.0, 0.0))
    alone = paired_difference({1: 5.0}, {1: 4.0})
    assert alone is not None
    assert (alone.half, alone.resolved) == (math.inf, False)
    assert paired_difference({1: 5.0}, {2: 4.0}) is None


def test_a_verdict_says_no_difference_resolved_exactly_where_the_interval_contains_zero() -> None:
    assert Difference(0.0123, 0.0100).text(LOSS) == "+0.0123 ± 0.0100"
    assert Difference(-0.0123, 0.0124).text(LOSS) == f"{UNRESOLVED} (-0.0123 ± 0.0124)"
    assert Difference(-0.013, 0.002).text(KNN) == "-1.3 ± 0.2"
    assert Difference(0.0, 0.0).text(LOSS).startswith(UNRESOLVED)
    assert Difference(-0.00001, 0.0002).text(LOSS) == f"{UNRESOLVED} (+0.0000 ± 0.0002)"
    assert Difference(0.5, math.inf).text(LOSS) == f"{UNRESOLVED} (+0.5000 ± unknown)"


def test_every_cell_is_made_once_per_seed_and_no_seed_is_the_bases() -> None:
    jobs = jobs_of(CPU)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    wanted = set(quality_cells(CPU)) | set(view_cells(CPU))
    assert len(wanted) == 5 + 2 * 5 - 2
    for seed in range(1, CPU.seeds + 1):
        assert wanted <= {job.cell for job in jobs if job.seed == seed}
    assert [job.cell.kind for job in jobs if job.seed == 0] == ["base"]


def fake(job: Job, *_: Any) -> dict[str, Any]:
    cell = {"run": job.name, "kind": job.cell.kind, "views": job.cell.views, "seed": job.seed}
    loss = 1 + job.seed + (0.5 if job.cell.kind == "small" else 0.01 * (job.seed % 2))
    losses = {} if job.cell.kind == "base" else {"loss": loss, "feature": loss, "attention": 0.0}
    return cell | losses | {"knn": 0.5, "linear": 0.5, "seconds": 1.0}


def performed(place: Place, config: Fidelity, monkeypatch: pytest.MonkeyPatch, stop_at: int = 10**6) -> list[str]:
    """Run what is missing with a stand-in for the work; return the names of what was performed."""
    names: list[str] = []

    def work(job: Job, *more: Any) -> dict[str, Any] | None:
        if len(names) == stop_at:
            raise RuntimeError("the third run failed")
        names.append(job.name)
        return fake(job)

    monkeypatch.setattr(fidelity_runs, "perform", work)
    with ThreadPoolExecutor(1) as pool:
        run_missing(jobs_of(config), config, place, pool, say=lambda text: None)
    return names


def test_what_is_recorded_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("", "", str(tmp_path), "cpu")
    every = [job.name for job in jobs_of(TINY)]
    with pytest.raises(RuntimeError, match="third"):
        performed(place, TINY, monkeypatch, stop_at=2)
    assert sorted(line["run"] for line in read_results(place.results)) == sorted(every[:2])
    with place.results.open("a") as file:
        file.write('{"run": "' + every[2])  # a kill in the middle of a line
    assert performed(place, TINY, monkeypatch) == every[2:]
    assert sorted(line["run"] for line in read_results(place.results)) == sorted(every)
    assert performed(place, TINY, monkeypatch) == []
    assert len(place.results.read_text().splitlines()) == len(every)


def test_what_is_under_way_when_another_run_fails_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, names = Place("", "", str(tmp_path), "cpu"), [job.name for job in jobs_of(TINY)]
    failed = threading.Event()

    def work(job: Job, *_: Any) -> dict[str, Any]:
        if job.name == names[0]:
            assert failed.wait(60)
        elif not failed.is_set():
            failed.set()
            raise RuntimeError("the second run failed")
        return fake(job)

    monkeypatch.setattr(fidelity_runs, "perform", work)
    with ThreadPoolExecutor(2) as pool, pytest.raises(RuntimeError, match="second"):
        run_missing(jobs_of(TINY), TINY, place, pool, say=lambda text: None)
    assert names[0] in {line["run"] for line in read_results(place.results)}


def test_a_run_that_a_signal_stopped_has_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("", "", str(tmp_path), "cpu")
    monkeypatch.setattr(fidelity_runs, "perform", lambda *_: None)
    with ThreadPoolExecutor(1) as pool:
        run_missing(jobs_of(TINY), TINY, place, pool)
    assert read_results(place.results) == []


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            fidelity_runs.start_worker(1)
            os.write(write, b".")
        time.sleep(120)
        os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"."
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    ended, _, _ = select.select([read], [], [], 60)  # the pipe ends when nobody can write into it any more
    assert ended
    assert os.read(read, 1) == b""


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out" / "settings.json"
    require_same_settings(path, asdict(TINY))
    require_same_settings(path, asdict(TINY))
    with pytest.raises(IdentityError, match="epochs"):
        require_same_settings(path, asdict(replace(TINY, epochs=3)))


def test_tables_stand_between_the_marks_and_the_picture_is_drawn(tmp_path: Path) -> None:
    results = [fake(job) for job in jobs_of(TINY)]
    sizes = {"default": {"bytes_per_view": 1234.5, "errors": {"mse": 0.04, "kl": 0.03}}}
    tables = markdown("cpu", TINY, results, sizes, "a machine\npython -m benchmarks.fidelity")
    assert "| +0.4950 ± " in tables  # small, two seeds: 0.5 and 0.49
    assert f"| default, 1 view | {UNRESOLVED} (+0.0000 ± 0.0000)" in tables
    assert "| base | - | - | - | 50.0 % | 50.0 % |" in tables
    document = tmp_path / "doc.md"
    document.write_text("\n".join(["before", *MARKS, "after"]))
    for _ in range(2):
        put_between_marks(document, tables)
    assert document.read_text() == "\n".join(["before", MARKS[0], tables, MARKS[1], "after"])
    document.write_text("no place")
    with pytest.raises(TecCacheError, match="no place"):
        put_between_marks(document, tables)
    draw(TINY, results, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Base and caches of the tiny configuration."""
    folder = tmp_path_factory.mktemp("fidelity")
    shards = write_shards(folder / "photos", [48])
    place = Place(str(shards), str(shards), str(folder / "out"), "cpu")
    prepare(TINY, place)
    return place


def test_the_held_out_loss_is_the_trainings_loss(place: Place) -> None:
    """On the same batch, with the same noise."""
    cache, compute = open_cache(place.held_out), resolve_compute("cpu", "auto")
    recipe = replace(
        fidelity_runs.training(TINY, place, "unused", seed=0, target=HELD_OUT), cache=place.held_out, views=1
    )
    source, student = prepare_student(recipe, cache, compute)
    ours = held_out_losses(student, cache, TINY, compute.device)
    task = Pretrain(recipe, cache, source, student, compute, Ranks())
    loop = Loop(task, recipe, compute, Ranks())
    with torch.no_grad():
        theirs = [loop.losses(batch) for batch in task.batches(0, TINY.masks * task.steps_per_epoch)]
    assert len(theirs) == TINY.masks * (33 // 16)
    for name in ("loss", "feature", "attention"):
        assert ours[name] == pytest.approx(np.mean([float(losses[name]) for losses in theirs]), rel=1e-6)


def test_cells_of_a_seed_begin_alike_and_differ_by_their_targets_alone(place: Place) -> None:
    lines = {}
    for cell in (Cell("online", 1), Cell("exact", 1), Cell("small", 1), Cell("exact", 2)):
        line = perform(Job(cell, 1), TINY, place)
        assert line is not None
        lines[cell] = line
    first = {cell: read_metrics(Path(place.out, "runs", Job(cell, 1).name, "run"))[0] for cell in lines}
    assert len({(values["step"], values["lr"]) for values in first.values()}) == 1
    assert first[Cell("exact", 1)]["loss"] == pytest.approx(first[Cell("online", 1)]["loss"], abs=2e-3)
    assert lines[Cell("exact", 1)]["loss"] == pytest.approx(lines[Cell("online", 1)]["loss"], abs=2e-3)
    assert lines[Cell("small", 1)]["loss"] != lines[Cell("exact", 1)]["loss"]
    assert lines[Cell("exact", 2)]["loss"] != lines[Cell("exact", 1)]["loss"]
    untrained = perform(Job(Cell("untrained", 0), 1), TINY, place)
    base = perform(Job(Cell("base", 0), 0), TINY, place)
    assert untrained is not None
    assert base is not None
    assert "loss" not in base
    assert untrained["loss"] > lines[Cell("exact", 1)]["loss"]


def test_recipes_of_two_cells_differ_in_what_the_name_says(place: Place) -> None:
    def recipe(**changes: Any) -> dict[str, Any]:
        config: TrainConfig = fidelity_runs.training(CPU, place, "out", seed=1, **changes)
        return asdict(config)

    one, other = recipe(target="exact", views=4), recipe(online=place.base, views=4)
    assert {name for name in one if one[name] != other[name]} == {"target", "online"}
    assert json.dumps(one)  # plain values, as a run's settings want them
