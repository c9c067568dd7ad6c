"""The benchmark of the gain: its choice, its intervals, its tables, and all of it once in a tiny form."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gain import photos, statistics
from benchmarks.gain.__main__ import main
from benchmarks.gain.jobs import Place
from benchmarks.gain.plan import CPU, GPU, NEW, PIXELS, TEST, Gain, Job, Model, arm, arm_jobs, chosen_epochs, curve_jobs
from benchmarks.gain.report import Found, draw, markdown, said
from benchmarks.gain.running import Failed, run_jobs
from benchmarks.gain.statistics import bootstrap
from tec_cache.errors import TecCacheError
from tests.conftest import encoded, photo, write_shards, write_tar


def test_e_is_where_twice_as_many_epochs_gain_less_than_the_bar() -> None:
    config = replace(CPU, epochs=10, multiples=(1, 2, 4, 8, 16))
    rising = {10: 0.30, 20: 0.35, 40: 0.39, 80: 0.42, 160: 0.44}
    assert chosen_epochs(config, rising) == (80, False)
    assert chosen_epochs(config, rising | {40: 0.412}) == (40, True)  # 0.8 points more at 80
    assert chosen_epochs(config, rising | {20: 0.305}) == (80, False)  # the first point is not chosen
    assert chosen_epochs(replace(config, at=8), rising) == (80, False)
    assert chosen_epochs(replace(config, at=4), rising | {40: 0.415}) == (40, True)


def test_every_arm_waits_for_its_base_alone() -> None:
    config = replace(CPU, seeds=2, more_views=(1,))
    jobs = arm_jobs(config, 64)
    for job in jobs:
        assert all(need in jobs for need in job.needs(config))
    few = Model(NEW, 64, 2, 1)
    assert Job(few, TEST) in jobs
    assert Job(few, "make").needs(config) == [Job(Model(PIXELS, 64, 2, config.views), "make")]
    assert arm(config, "A", 64, 1).epochs == 128
    assert arm(config, "B", 64, 1).epochs * config.rounds == 128
    for job in jobs:
        assert Model.named(job.model.name) == job.model


def test_the_curve_is_never_judged_on_test_photos() -> None:
    assert {job.what for job in curve_jobs(GPU)} == {"make", "valid"}


def test_bootstrap_of_what_is_the_same_everywhere_is_that_difference() -> None:
    ours, reference = np.ones((3, 50)), np.zeros((3, 50))
    found = bootstrap(ours, reference)
    assert (found.mean, found.low, found.high) == pytest.approx((100.0, 100.0, 100.0))
    assert found.resolved


def test_bootstrap_over_photos_alone_has_the_width_that_theory_gives() -> None:
    draw = np.random.default_rng(1)
    one = (draw.random(4000) < 0.6).astype(float)
    other = (draw.random(4000) < 0.6).astype(float)
    found = bootstrap(one[None], other[None])
    error = 100 * (one - other).std() / math.sqrt(4000)
    assert found.mean == pytest.approx(100 * (one.mean() - other.mean()))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_bootstrap_over_seeds_sees_their_spread() -> None:
    reference = np.zeros((3, 400))
    ours = np.concatenate([np.ones((1, 400)), np.zeros((2, 400))])
    found = bootstrap(ours, reference)
    assert found.mean == pytest.approx(100 / 3)
    assert found.low == pytest.approx(0.0)  # a draw of the two others alone: (2/3)^3 of all
    assert found.high == pytest.approx(100.0)  # of the first alone: 1/27, more than 2.5 %
    assert not found.resolved


def test_bootstrap_refuses_arms_that_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="hits of"):
        bootstrap(np.ones((3, 10)), np.ones((3, 9)))


def invented(config: Gain, better: float) -> Found:
    """Results in which C is better than D by a share of the photos, and nothing else differs."""
    draw = np.random.default_rng(0)
    base = draw.random(2000)
    results: dict[Job, dict[str, Any]] = {}
    for job in arm_jobs(config, 64):
        right = base < (0.5 + better if job.model.kind == NEW else 0.5)
        hits = "".join(right.astype(np.uint8).astype(str))
        measured = {"fine-tuned": right.mean(), "fine-tuned, hits": hits, "kNN": 0.4, "linear": 0.5}
        tenth = {"fine-tuned, 10 %": right.mean(), "fine-tuned, 10 %, hits": hits}
        results[job] = {"seconds": 10.0} | (measured | tenth if job.what == TEST else {})
    curve = {epochs: {1: {"fine-tuned": 0.5, "kNN": 0.4, "linear": 0.45}} for epochs in config.curve()}
    return Found(config, curve, 64, True, results)


def test_sentences_follow_from_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 200)
    better, worse, same = (said(invented(CPU, by)) for by in (0.05, -0.05, 0.0))
    assert better[0].startswith("The new model (C) is better than its base: +")
    assert worse[0].startswith("The new model (C) is worse, not better than its base: -")
    assert same[0].startswith("The new model (C) is not shown to be better than its base: +0.00")
    assert better[1].startswith("The model after rounds (B) is not shown to be better than its base")
    text = markdown("cpu", invented(replace(CPU, more_views=(1, 2)), 0.05), "machine\npython -m benchmarks.gain")
    assert "| C - D | better than its base | **+" in text
    assert "The base's own curve" in text
    assert "| 2 | +0.00 [" in text
    draw(invented(CPU, 0.05), str(tmp_path / "gain.png"))
    assert (tmp_path / "gain.png").stat().st_size > 10_000


def test_parts_share_no_photo_and_a_tenth_is_of_what_is_learned(tmp_path: Path) -> None:
    shards = str(write_shards(tmp_path / "shards", [30, 30]))
    config = replace(CPU, photos=40, valid=20, judged=10)
    photos.cut(config, shards, shards, tmp_path / "parts")
    learn, tenth, valid, test = (
        photos.read(str(tmp_path / "parts" / name)) for name in (photos.LEARN, photos.TENTH, photos.VALID, photos.TEST)
    )
    assert [len(part) for part in (learn, tenth, valid, test)] == [40, 4, 20, 10]
    assert not {data for _, data, _ in learn} & {data for _, data, _ in valid}
    assert [data for _, data, _ in tenth] == [data for _, data, _ in learn][::10]
    with pytest.raises(TecCacheError, match="too few"):
        photos.cut(replace(config, photos=50), shards, shards, tmp_path / "other")


def test_a_job_that_fails_says_how(tmp_path: Path) -> None:
    place = Place(tmp_path, "cpu", 1, 1)
    (tmp_path / "settings.json").write_text("no settings")
    (tmp_path / "results").mkdir()
    with pytest.raises(Failed, match=r"(?s)pixels-16-views8-seed1\.make ended with 1.*JSONDecodeError"):
        run_jobs([Job(Model(PIXELS, 16, 1, 8), "make")], CPU, place, 1, math.inf, lambda line: None)


@pytest.mark.slow
def test_all_of_it_once_stopped_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # classes in tens: every tenth photo has every class
    members = [(f"p{n:03d}.{kind}", data) for n in range(160)
               for kind, data in (("jpg", encoded(photo(n))), ("cls", str(n // 10 % 4).encode()))]  # fmt: skip
    (tmp_path / "shards").mkdir()
    shards = str(write_tar(tmp_path / "shards" / "shard-000000.tar", members))
    values = {"photos": 120, "valid": 40, "judged": 30, "width": 24, "heads": 2, "depth": 3, "epochs": 2, "at": 2,
              "multiples": [1, 2, 4], "seeds": 2, "tune_epochs": 1, "tenth_epochs": 1, "batch_size": 40,
              "tune_batch": 6, "views": 2, "more_views": [1]}  # fmt: skip
    given = [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    command = [shards, "--test", shards, "--out", str(tmp_path / "out"), "--jobs", "2", *given]
    assert main([*command, "--minutes", "0.4"]) == 3
    assert "there is more to do" in capsys.readouterr().out
    declared = json.loads((tmp_path / "out" / "declared.json").read_text())
    assert set(declared["arms"]) == set("ABCD")
    assert main([*command, "--markdown", str(tmp_path / "gain.md"), "--plot", str(tmp_path / "gain.png")]) == 0
    text = (tmp_path / "gain.md").read_text()
    assert "**E = 4** epochs" in text
    assert "nan" not in text
    assert main(command) == 0  # everything is there: nothing is trained again
