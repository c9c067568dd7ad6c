"""A training that is judged now and then: the numbers of its exports, and not a bit of the training changed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cli
import pipelines.judging.student_judge
import pipelines.probe
from pipelines.export import export, trained_student
from pipelines.judging.frozen_features import Features, Inputs, Scores, scores_of
from pipelines.judging.student_judge import StudentJudge, exported_encoder, probe_config
from pipelines.probe import load_model, probe
from pipelines.terminal.texts import train_text
from pipelines.train import resolved_settings, train
from tec_cache.config import ProbeConfig, TrainConfig
from tec_cache.device import Compute
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, SourceError
from tec_cache.run.layout import checkpoints
from tec_cache.run.loop import Loop
from tec_cache.run.metrics import read_metrics
from tec_cache.student.model import Student
from tec_cache.tasks.pretrain import Pretrain
from tests.conftest import encoded, last_checkpoint, photo, tiny_training, write_shards, write_tar
from tests.launch import Job, options, torchrun

CPU = Compute(torch.device("cpu"), "float32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 labelled photos to learn from and 13 to judge on, of four classes."""
    folder = tmp_path_factory.mktemp("labelled")
    write_shards(folder / "train", [24, 16])
    write_shards(folder / "test", [13], start=100)
    return folder


def judged_training(cache: Path, run: Path, photos: Path, **changes: Any) -> TrainConfig:
    """Nine steps, three to an epoch; lines of metrics.jsonl at steps 2, 4, 6, 8 and 9."""
    probes = {"probe_every": 1, "probe_train": str(photos / "train"), "probe_test": str(photos / "test")}
    values = {"epochs": 3, "warmup_epochs": 1, "log_every": 2, "probe_neighbours": 3} | probes
    return tiny_training(cache, run, **(values | changes))


def plain_training(cache: Path, run: Path, **changes: Any) -> TrainConfig:
    return tiny_training(cache, run, **({"epochs": 3, "warmup_epochs": 1, "log_every": 2} | changes))


@pytest.fixture(scope="module")
def plain(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody judges."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train(plain_training(made_cache, run))
    return run


@pytest.fixture(scope="module")
def judged(made_cache: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, judged after every epoch."""
    run = tmp_path_factory.mktemp("judged") / "run"
    train(judged_training(made_cache, run, photos))
    return run


def scores(run: Path) -> dict[int, tuple[float, float]]:
    """Step -> both accuracies."""
    lines = [line for line in read_metrics(run) if "probe_knn" in line]
    assert all("probe_linear" in line and "loss" in line for line in lines)
    return {line["step"]: (line["probe_knn"], line["probe_linear"]) for line in lines}


def by_export(run: Path, photos: Path, out: Path, checkpoint: Path, precision: str = "auto") -> tuple[float, float]:
    """What `tec-cache export` and `tec-cache probe` make of a checkpoint."""
    export(run, out, checkpoint=checkpoint)
    places = {"model": str(out), "train": str(photos / "train"), "test": str(photos / "test")}
    found = probe(ProbeConfig(**places, neighbours=3, device="cpu", precision=precision))
    return found.knn, found.linear


def equal(one: Any, other: Any) -> bool:
    """Whether what two checkpoints hold is the same to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_same_training(ours: Path, theirs: Path) -> None:
    """Weights, optimizer and sums of the last checkpoint; losses, norms and learning rates of the lines of both."""
    one, other = last_checkpoint(ours), last_checkpoint(theirs)
    assert {"model", "optimizer", "sums", "summed", "step", "run"} <= one.keys()
    assert equal(one, other)
    free = ("images_per_second", "waited", "seconds", "probe_knn", "probe_linear")
    lines = [{line["step"]: {n: v for n, v in line.items() if n not in free} for line in read_metrics(r)}
             for r in (ours, theirs)]  # fmt: skip
    shared = lines[0].keys() & lines[1].keys()
    assert {step: lines[0][step] for step in shared} == {step: lines[1][step] for step in shared}
    assert {2, 4, 6, 8, 9} <= shared


# ---- the numbers ---------------------------------------------------------------------------------------------------


def test_the_scores_are_those_of_the_export_at_that_step(judged: Path, photos: Path, tmp_path: Path) -> None:
    found = scores(judged)
    assert list(found) == [3, 6, 9]
    kept = checkpoints(judged)
    assert [path.stem for path in kept] == ["step-000000006", "step-000000009"]
    for path, step in zip(kept, (6, 9), strict=True):
        assert by_export(judged, photos, tmp_path / str(step), path) == found[step]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loop_judges_by_the_features_that_the_probe_sees(
    made_cache: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Thirteen photos hide small differences of features: here none may be."""
    seen: list[tuple[Features, Features]] = []

    def remember(train: Features, test: Features, config: ProbeConfig) -> Scores:
        seen.append((train, test))
        return scores_of(train, test, config)

    monkeypatch.setattr(pipelines.judging.student_judge, "scores_of", remember)
    monkeypatch.setattr(pipelines.probe, "scores_of", remember)
    run = tmp_path / "run"
    train(judged_training(made_cache, run, photos, steps=3, precision=precision))
    found = by_export(run, photos, tmp_path / "out", checkpoints(run)[-1], precision=precision)
    assert found == scores(run)[3]
    ours, theirs = seen
    assert all(torch.equal(a.values, b.values) for a, b in zip(ours, theirs, strict=True))
    assert [len(part.values) for part in ours] == [40, 13]


@pytest.mark.parametrize("adapters", ["input", "none"])
def test_features_are_those_of_the_export_to_the_bit(
    made_cache: Path, photos: Path, tmp_path: Path, adapters: str
) -> None:
    run = tmp_path / "run"
    config = judged_training(made_cache, run, photos, steps=2, adapters=adapters)
    train(config)
    export(run, tmp_path / "out")
    student, _ = trained_student(run)
    probing = probe_config(config)
    assert probing is not None
    exported = load_model(ProbeConfig(model=str(tmp_path / "out"), train="a", test="b"))
    inputs = Inputs.opened(probing)
    ours, theirs = (inputs.features(m, probing, CPU, True) for m in (exported_encoder(student), exported))
    assert all(torch.equal(a.values, b.values) for a, b in zip(ours, theirs, strict=True))
    assert len(ours[0].values) == 40
    plain_token = student.encoder.cls_token.detach()
    folded = exported_encoder(student).model.cls_token
    assert torch.equal(plain_token, folded) == (adapters == "none")  # type: ignore[arg-type]


def test_the_scores_are_in_the_summary_the_text_and_tensorboard(
    made_cache: Path, photos: Path, tmp_path: Path, judged: Path
) -> None:
    summary = train(judged_training(made_cache, judged, photos))  # nothing is left to do
    knn, linear = scores(judged)[9]
    assert summary.scores == {"step": 9, "probe_knn": knn, "probe_linear": linear}
    assert summary.to_json()["scores"]["probe_knn"] == knn
    assert f"judged       kNN {knn:.2%}, linear {linear:.2%} at step 9" in train_text(summary, False, "")
    board = EventAccumulator(str(judged / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("probe_knn")] == [3, 6, 9]
    assert [event.value for event in board.Scalars("probe_linear")] == pytest.approx(
        [found[1] for found in scores(judged).values()]
    )


def test_every_other_epoch_and_the_last_step(made_cache: Path, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(judged_training(made_cache, run, photos, probe_every=2, steps=8))
    assert list(scores(run)) == [6, 8]


def test_the_first_so_many_photos(made_cache: Path, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(judged_training(made_cache, run, photos, steps=1, probe_limit=5))
    assert all(score * 5 == pytest.approx(round(score * 5)) for score in scores(run)[1])


def test_a_cache_is_judged_on_too(made_cache: Path, tmp_path: Path, photos: Path) -> None:
    run = tmp_path / "run"
    train(judged_training(made_cache, run, photos, steps=1, probe_train=str(made_cache), probe_limit=20))
    assert list(scores(run)) == [1]


# ---- nothing is disturbed ------------------------------------------------------------------------------------------


def test_a_judged_training_is_the_same_to_the_bit(judged: Path, plain: Path) -> None:
    assert_same_training(judged, plain)
    assert len(read_metrics(judged)) == len(read_metrics(plain)) + 1, "step 3 is judged, and no line of --log-every"


def test_stopped_in_the_middle_of_an_epoch_and_resumed_it_is_the_same(
    made_cache: Path, photos: Path, tmp_path: Path, judged: Path, plain: Path
) -> None:
    """The judgement begins, ends and changes while the run goes on: it is none of the run's identity."""
    run = tmp_path / "run"
    train(judged_training(made_cache, run, photos, steps=4))
    train(plain_training(made_cache, run, steps=7))
    train(judged_training(made_cache, run, photos, probe_every=2, probe_neighbours=5))
    assert list(scores(run)) == [3, 4, 9]
    # a stop writes a line, which no other run has at steps 4 and 7
    one, other = last_checkpoint(run), last_checkpoint(plain)
    assert equal(one["model"], other["model"])
    assert equal(one["optimizer"], other["optimizer"])
    resumed = tmp_path / "resumed"
    interrupted(judged_training(made_cache, resumed, photos), at=5)
    assert train(judged_training(made_cache, resumed, photos)).finished
    assert_same_training(resumed, plain)
    assert scores(resumed) == scores(judged)


def interrupted(config: TrainConfig, *, at: int) -> None:
    step = Loop.train_step

    def and_interrupt(self: Loop[Any], *args: Any, **more: Any) -> None:
        step(self, *args, **more)
        if self.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "train_step", and_interrupt)
        summary = train(config)
    assert (summary.steps, summary.finished) == (at, False)


def test_a_signal_in_the_middle_of_a_judgement_lets_it_end_and_keeps_a_checkpoint(
    made_cache: Path, photos: Path, tmp_path: Path, judged: Path, plain: Path
) -> None:
    run, inner = tmp_path / "run", Inputs.features

    def and_interrupt(self: Inputs, *args: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *args, **more)

    config = judged_training(made_cache, run, photos, save_every=100.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inputs, "features", and_interrupt)
        summary = train(config)
    assert (summary.steps, summary.finished) == (3, False)
    assert last_checkpoint(run)["step"] == 3
    assert scores(run) == {3: scores(judged)[3]}
    assert train(config).finished
    assert_same_training(run, plain)


def test_a_second_ctrl_c_ends_a_judgement_and_the_run_goes_on_from_its_last_checkpoint(
    made_cache: Path, photos: Path, tmp_path: Path, plain: Path
) -> None:
    run, inner = tmp_path / "run", Inputs.features
    calls: list[int] = []

    def and_interrupt(self: Inputs, *args: Any, **more: Any) -> Any:
        calls.append(1)
        for _ in range(2 if len(calls) == 2 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *args, **more)

    config = judged_training(made_cache, run, photos)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inputs, "features", and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert last_checkpoint(run)["step"] == 3
    assert train(config).finished
    assert_same_training(run, plain)


def test_whatever_a_judge_draws_the_generators_stand_as_they_did(
    made_cache: Path, photos: Path, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, states = StudentJudge.__call__, []

    def state() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index, union-attr]

    def and_draw(self: StudentJudge, student: Student) -> dict[str, float]:
        random.random(), np.random.rand(), torch.rand(3)
        return inner(self, student)

    def and_look(self: Loop[Any]) -> dict[str, float]:
        before, modes = state(), [(m.training, id(m)) for m in self.module.modules()]
        wanted = [p.requires_grad for p in self.module.parameters()]
        found = evaluate(self)
        assert state() == before
        assert modes == [(m.training, id(m)) for m in self.module.modules()]
        assert wanted == [p.requires_grad for p in self.module.parameters()]
        states.append(before)
        return found

    evaluate = Loop.evaluate
    monkeypatch.setattr(StudentJudge, "__call__", and_draw)
    monkeypatch.setattr(Loop, "evaluate", and_look)
    train(judged_training(made_cache, tmp_path / "run", photos))
    assert len(states) == 3
    assert_same_training(tmp_path / "run", plain)


@pytest.mark.slow
def test_a_compiled_student_is_judged_by_its_plain_encoder(made_cache: Path, photos: Path, tmp_path: Path) -> None:
    for name, changes in (("judged", {}), ("plain", {"probe_every": None, "probe_train": None, "probe_test": None})):
        neighbours = {} if name == "judged" else {"probe_neighbours": 20}
        train(judged_training(made_cache, tmp_path / name, photos, compile=True, **changes, **neighbours))
    assert_same_training(tmp_path / "judged", tmp_path / "plain")
    found = by_export(tmp_path / "judged", photos, tmp_path / "out", checkpoints(tmp_path / "judged")[-1])
    assert found == scores(tmp_path / "judged")[9]


# ---- several processes ---------------------------------------------------------------------------------------------


def test_two_processes_are_judged_by_one_and_train_as_if_they_were_not(
    made_cache: Path, photos: Path, tmp_path: Path
) -> None:
    for name, config in (
        ("judged", judged_training(made_cache, tmp_path / "judged", photos)),
        ("plain", plain_training(made_cache, tmp_path / "plain")),
    ):
        job = torchrun(tmp_path / f"log-{name}", 2, "--no-python", "tec-cache", "train", *options(config), "--json")
        assert job.process.returncode == 0, job.err
        summary = json.loads(job.out)
        assert summary["finished"]
    assert_same_training(tmp_path / "judged", tmp_path / "plain")
    found = scores(tmp_path / "judged")
    assert list(found) == [3, 6, 9]
    for path in checkpoints(tmp_path / "judged"):
        assert by_export(tmp_path / "judged", photos, tmp_path / path.stem, path) == found[int(path.stem[-2:])]


SLOW_JUDGE = """
import pathlib, time
import cli
from pipelines.judging.frozen_features import Inputs

inner = Inputs.features

def slowly(self, *args, **more):
    pathlib.Path({marker!r}).touch()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        time.sleep(0.1)
    return inner(self, *args, **more)

Inputs.features = slowly
if __name__ == "__main__":
    cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_signals_while_one_process_judges_and_the_other_waits(
    made_cache: Path, photos: Path, tmp_path: Path, signals: int
) -> None:
    """One to both ranks: they agree on a step. A Ctrl-C after it at the one that judges: both end."""
    run, script, marker = tmp_path / "run", tmp_path / "judged.py", tmp_path / "judging"
    script.write_text(SLOW_JUDGE.format(marker=str(marker)))
    config = judged_training(made_cache, run, photos, epochs=50, save_every=100.0)
    with Job(tmp_path / "log", 2, str(script), "train", *options(config), "--quiet") as job:
        job.wait_until(marker.exists, "a judgement")
        for pid in job.ranks().values():
            os.kill(pid, signal.SIGTERM)
        if signals == 2:
            time.sleep(0.5)  # two signals at once are one
            os.kill(job.ranks()[0], signal.SIGINT)
        code = job.end()
    if signals == 1:
        assert code == 0, job.err
        assert last_checkpoint(run)["step"] in (3, 4)
        assert list(scores(run)) == [3]
        assert "go on with" in job.out
    else:
        assert code == 1
        assert "interrupted" in job.err
        assert not checkpoints(run)


def test_a_broken_photo_ends_all_processes_and_writes_nothing(made_cache: Path, photos: Path, tmp_path: Path) -> None:
    config = judged_training(made_cache, tmp_path / "run", photos, probe_test=str(broken_photos(tmp_path)))
    job = torchrun(tmp_path / "log", 2, "--no-python", "tec-cache", "train", *options(config), "--quiet")
    assert job.process.returncode == 1
    assert "photo 'bad'" in job.err
    assert not (tmp_path / "run").exists()


# ---- what is refused -----------------------------------------------------------------------------------------------


def broken_photos(folder: Path) -> Path:
    """Two photos, one of them cut in half."""
    good = encoded(photo(1))
    members = [("good.jpg", good), ("good.cls", b"0"), ("bad.jpg", good[: len(good) // 2]), ("bad.cls", b"1")]
    return write_tar(folder / "broken.tar", members)


@pytest.mark.parametrize("part", ["probe_train", "probe_test"])
def test_a_broken_photo_is_refused_before_anything_is_written(
    made_cache: Path, photos: Path, tmp_path: Path, part: str
) -> None:
    changes: dict[str, Any] = {part: str(broken_photos(tmp_path)), "steps": 3}
    for dry_run in (True, False):
        with pytest.raises(SourceError, match="photo 'bad': not a whole image"):
            train(judged_training(made_cache, tmp_path / "run", photos, **changes), dry_run=dry_run)
    assert not (tmp_path / "run").exists()
    summary = train(judged_training(made_cache, tmp_path / "run", photos, on_error="skip", **changes))
    assert summary.remarks == ["left out: 1 not a whole image"]
    assert "probes       left out: 1 not a whole image" in train_text(summary, False, "")


def test_a_photo_that_breaks_later_stops_the_run(
    made_cache: Path, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test, evaluate = write_shards(tmp_path / "test", [3]), Pretrain.evaluate

    def and_break(self: Pretrain, model: torch.nn.Module) -> dict[str, float]:
        broken_photos(tmp_path).rename(test / "shard-000000.tar")
        return evaluate(self, model)

    monkeypatch.setattr(Pretrain, "evaluate", and_break)
    with pytest.raises(SourceError, match="photo 'bad'"):
        train(judged_training(made_cache, tmp_path / "run", photos, probe_test=str(test)))


def test_classes_that_were_never_learned_are_refused_before_anything_is_written(
    made_cache: Path, tmp_path: Path
) -> None:
    for part, names in (("train", ("cat",)), ("test", ("cat", "fox"))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "a.jpg").write_bytes(encoded(photo(1)))
    with pytest.raises(ConfigError, match="the classes differ"):
        train(judged_training(made_cache, tmp_path / "run", tmp_path))
    assert not (tmp_path / "run").exists()


PROBES = {"probe_every": 1, "probe_train": "a", "probe_test": "b"}


@pytest.mark.parametrize("given", [{1}, {2}, {3}, {1, 2}, {1, 3}, {2, 3}])
def test_a_part_without_the_others_says_what_is_missing(given: set[int]) -> None:
    named = {name: value for i, (name, value) in enumerate(PROBES.items(), start=1) if i in given}
    with pytest.raises(ConfigError, match="a periodic judgement without ") as error:
        TrainConfig(cache="c", out="r", **named)  # type: ignore[arg-type]
    for name in PROBES:
        option = "--" + name.replace("_", "-")
        assert (option in error.value.what) == (name not in named)
        assert option in error.value.todo


@pytest.mark.parametrize("changes", [{"probe_every": 0}, {"probe_limit": 0}, {"probe_neighbours": 0}])
def test_numbers_below_one_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="--probe-"):
        TrainConfig(cache="c", out="r", **(PROBES | changes))  # type: ignore[arg-type]


def test_the_command_takes_the_options(
    made_cache: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(judged_training(made_cache, tmp_path / "run", photos, steps=3))
    monkeypatch.setattr("sys.argv", ["tec-cache", "train", *words, "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    summary = json.loads(capsys.readouterr().out)
    assert (stop.value.code or 0) == 0
    assert summary["scores"]["step"] == 3
    assert {"probe_knn", "probe_linear"} <= summary["scores"].keys()


# ---- run.json ------------------------------------------------------------------------------------------------------


def test_no_password_of_a_url_is_kept(made_cache: Path, tmp_path: Path) -> None:
    from pipelines.train import prepare_student
    from tec_cache.cache.opening import open_cache

    probes = {"probe_every": 1, "probe_train": "https://h/a.tar?signature=s3cret", "probe_test": "s3://u:s3cret@b/c"}
    config = tiny_training(made_cache, tmp_path / "run", **probes)
    cache = open_cache(made_cache)
    settings = resolved_settings(config, cache, *prepare_student(config, cache, CPU))
    assert "s3cret" not in json.dumps(settings)
    assert settings["config"]["probe_train"].startswith("https://h/a.tar")


def test_who_judges_alone_waits_for_nobody(photos: Path, tmp_path: Path) -> None:
    config = probe_config(judged_training(tmp_path, tmp_path, photos))
    assert config is not None
    assert StudentJudge(config, 32, CPU, Ranks(), quiet=True).remarks() == []
    assert probe_config(TrainConfig(cache="c", out="r")) is None
