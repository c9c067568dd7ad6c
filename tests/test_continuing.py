"""`train --out RUN`: what a command leaves out is taken from the run that goes on, and said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cli
from pipelines.terminal.texts import train_text
from pipelines.train import train
from tec_cache.run.metrics import SPEED, read_metrics
from tests.conftest import encoded, photo, tiny_training

Called = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def begun(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, stopped after the second."""
    run = tmp_path_factory.mktemp("continuing") / "run"
    train(tiny_training(made_cache, run, epochs=2, steps=2, log_every=1, views=1, tau=0.7))
    return run


@pytest.fixture(scope="module")
def photos_to_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    for number in range(8):
        place = folder / ("cats" if number % 2 else "dogs") / f"{number}.jpg"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encoded(photo(number)))
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Called:
    def called(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["tec-cache", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return called


def numbers(run: Path) -> list[dict[str, float]]:
    return [{name: v for name, v in line.items() if name not in SPEED} for line in read_metrics(run)]


def test_the_folder_is_enough(run: Path, made_cache: Path, tmp_path: Path, call: Called) -> None:
    code, said = call("train", "--out", run)
    assert code == 0, said
    first = said.splitlines()[0]
    assert first.startswith(f"{run} goes on with its own settings where none were given: ")
    for words in ("--epochs 2", "--batch-size 32", "--student-arg embed_dim=48", "--tau 0.7", f"--cache {made_cache}"):
        assert words in first
    assert "--steps" not in first, "that was the other call's"
    undisturbed = tmp_path / "undisturbed"
    train(tiny_training(made_cache, undisturbed, epochs=2, log_every=1, views=1, tau=0.7))
    assert numbers(run) == numbers(undisturbed)


def test_what_is_given_counts(run: Path, call: Called) -> None:
    code, said = call("train", "--out", run, "--log-every", 2, "--device", "cpu", "--threads", 1)
    assert code == 0, said
    assert "--log-every" not in said.splitlines()[0]
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 4, 6]


def test_another_setting_is_refused_as_before(run: Path, call: Called) -> None:
    code, said = call("train", "--out", run, "--batch-size", 16)
    assert code == 2
    assert "config.batch_size: stored 32, asked 16" in said
    assert "config.epochs" not in said, "what was left out is the run's"


def test_a_run_that_learns_from_something_else_is_refused(run: Path, call: Called) -> None:
    code, said = call("train", "--out", run, "--pixels")
    assert code == 2
    assert "this run learns from stored targets, and --pixels was given" in said
    code, said = call("train", "--out", run, "--target", "tiny:0.5")
    assert code == 2
    assert "targets" in said
    code, said = call("train", "--out", run, "--target", "tiny", "--steps", 3)
    assert code == 0, said


def test_a_file_of_settings_stands_between(run: Path, tmp_path: Path, call: Called) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("log_every = 3\n")
    code, said = call("train", "--out", run, "--config", file)
    assert code == 0, said
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 6]


def test_nothing_is_taken_where_a_run_is_replaced_or_is_none(run: Path, tmp_path: Path, call: Called) -> None:
    for words in (("--out", run, "--overwrite"), ("--out", tmp_path / "new")):
        code, said = call("train", *words)
        assert code == 2
        assert "no cache was named" in said
    assert json.loads((run / "run.json").read_text())["config"]["batch_size"] == 32


def test_nothing_is_said_when_quiet_or_when_all_is_given(run: Path, made_cache: Path, call: Called) -> None:
    code, said = call("train", "--out", run, "--steps", 3, "--quiet")
    assert (code, said) == (0, "")


def test_a_run_of_another_program_is_refused(run: Path, call: Called) -> None:
    code, said = call("finetune", "mae", "--out", run)
    assert code == 1
    assert "this is a run of tec-cache train, not of finetune" in said


def test_the_first_step_has_a_line_at_once(run: Path, made_cache: Path, tmp_path: Path, call: Called) -> None:
    code, said = call("train", "--out", run, "--log-every", 100)
    assert code == 0
    assert said.splitlines()[1].startswith("train: step 3 of 6, loss ")
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 6], "and the log is as it was asked for"
    undisturbed = tmp_path / "undisturbed"
    train(tiny_training(made_cache, undisturbed, epochs=2, log_every=1, views=1, tau=0.7))
    mean = sum(line["loss"] for line in read_metrics(undisturbed)[2:]) / 4
    assert read_metrics(run)[-1]["loss"] == pytest.approx(mean, rel=1e-6)


def test_what_steps_left_over_is_said(run: Path, made_cache: Path) -> None:
    summary = train(tiny_training(made_cache, run, epochs=2, steps=5, log_every=1, views=1, tau=0.7))
    said = train_text(summary, False, "")
    assert f"left         1 step of the schedule, after --steps: tec-cache train --out {run} goes on" in said
    summary = train(tiny_training(made_cache, run, epochs=2, log_every=1, views=1, tau=0.7))
    assert "of the schedule" not in train_text(summary, False, "")


def test_probes_go_on_too_and_can_be_dropped(
    run: Path, photos_to_judge: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*words: object) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["tec-cache", "train", "--out", str(run), "--json", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert not stop.value.code, said
        return dict(json.loads(said.out)["scores"])

    settings = json.loads((run / "run.json").read_text())
    settings["config"] |= {"probe_every": 1, "probe_train": str(photos_to_judge), "probe_test": str(photos_to_judge)}
    (run / "run.json").write_text(json.dumps(settings))
    assert asked("--steps", 3, "--probe-neighbours", 1)["step"] == 3
    assert asked("--steps", 4, "--probe-every", 0) == {}
    assert "probe_knn" not in read_metrics(run)[-1]
