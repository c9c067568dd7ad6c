"""A run that is lengthened: only when asked, under the new schedule from its step on, and the same when killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pipelines.export import export
from pipelines.info import info
from pipelines.terminal.texts import train_text
from pipelines.train import train
from tec_cache.errors import ConfigError, IdentityError
from tec_cache.run.layout import checkpoints
from tec_cache.run.metrics import read_metrics
from tec_cache.run.optimizer import create_schedule, scaled_lr
from tec_cache.run.settings import load_settings, run_identity
from tests.conftest import files_below, last_checkpoint, tiny_training

PER_EPOCH = 3
"""97 photos in batches of 32."""
SHORT, LONG = 2, 5


@pytest.fixture(scope="module")
def finished(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "r"
    assert train(tiny_training(made_cache, run, epochs=SHORT)).steps == SHORT * PER_EPOCH
    return run


@pytest.fixture(scope="module")
def longer(made_cache: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, lengthened without a disturbance."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("longer") / "r"))
    assert train(tiny_training(made_cache, run, epochs=LONG), extend=True).steps == LONG * PER_EPOCH
    return run


def schedule(epochs: int, steps: range) -> list[float]:
    """The learning rates of a run that had so many epochs from its beginning."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=scaled_lr(5e-3, 32))
    made = create_schedule(optimizer, total_steps=epochs * PER_EPOCH, warmup_steps=PER_EPOCH, min_lr=0.0)
    found = []
    for step in steps:
        made.step_update(step)
        found.append(float(optimizer.param_groups[0]["lr"]))
    return found


def rates(run: Path) -> list[float]:
    return [line["lr"] for line in read_metrics(run)]


def numbers(run: Path) -> list[dict[str, float]]:
    return [
        {n: v for n, v in line.items() if n not in ("images_per_second", "waited", "seconds")}
        for line in read_metrics(run)
    ]


def assert_same(run: Path, other: Path) -> None:
    ours, theirs = last_checkpoint(run), last_checkpoint(other)
    assert ours["step"] == theirs["step"]
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    assert numbers(run) == numbers(other)


def test_without_extend_it_is_refused_and_the_error_names_the_way(
    made_cache: Path, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "r"))
    before = files_below(run)
    with pytest.raises(IdentityError, match=r"config\.epochs: stored 2, asked 5") as error:
        train(tiny_training(made_cache, run, epochs=LONG))
    assert error.value.todo.startswith("go on with it under the schedule of 5 epochs by --extend; or ")
    with pytest.raises(IdentityError, match=r"config\.seed") as error:
        train(tiny_training(made_cache, run, epochs=LONG, seed=1))
    assert "--extend" not in error.value.todo
    with pytest.raises(IdentityError, match=r"config\.seed: stored 0, asked 1") as error:
        train(tiny_training(made_cache, run, epochs=LONG, seed=1), extend=True)
    assert "epochs" not in "".join(error.value.details)
    assert files_below(run) == before


def test_the_schedule_is_the_new_one_from_the_first_step_after(finished: Path, longer: Path) -> None:
    end = SHORT * PER_EPOCH
    assert rates(longer)[:end] == rates(finished) == pytest.approx(schedule(SHORT, range(end)))
    assert rates(longer)[end:] == pytest.approx(schedule(LONG, range(end, LONG * PER_EPOCH)))
    assert rates(longer)[end] > 3 * rates(longer)[end - 1], "the jump that the documentation tells of"
    assert [line["epoch"] for line in read_metrics(longer)] == [n for n in range(LONG) for _ in range(PER_EPOCH)]


def test_run_json_says_it_and_the_run_stays_the_one_it_was(finished: Path, longer: Path, tmp_path: Path) -> None:
    before, after = load_settings(finished), load_settings(longer)
    made = [{"from_step": 6, "from_epochs": SHORT, "to_epochs": LONG}]
    assert after == before | {
        "config": before["config"] | {"epochs": LONG}, "total_steps": LONG * PER_EPOCH, "extensions": made
    }  # fmt: skip
    assert run_identity(after) == run_identity(before)
    assert export(longer, tmp_path / "e").exists()
    assert info(str(longer))["finished"] is True
    assert info(str(longer))["config"]["epochs"] == LONG, "which the command that goes on takes from there"


@pytest.mark.parametrize("stop", [7, 10])
def test_stopped_and_started_again_equals_undisturbed(
    made_cache: Path, finished: Path, longer: Path, tmp_path: Path, stop: int
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "r"))
    train(tiny_training(made_cache, run, epochs=LONG, steps=stop), extend=True)
    again = train(tiny_training(made_cache, run, epochs=LONG), extend=stop == 7)  # both go on
    assert_same(run, longer)
    assert "lengthened   from 2 to 5 epochs at step 6" in train_text(again, False, "")
    assert len(load_settings(run)["extensions"]) == 1


def test_killed_before_its_first_step_and_with_its_last_checkpoint_lost(
    made_cache: Path, finished: Path, longer: Path, tmp_path: Path
) -> None:
    """The steps up to the one at which it was lengthened keep their schedule, whatever they are done again from."""
    run = Path(shutil.copytree(finished, tmp_path / "r"))
    train(tiny_training(made_cache, run, epochs=LONG, steps=6), extend=True)
    assert load_settings(run)["config"]["epochs"] == LONG
    assert [path.name for path in checkpoints(run)][-1] == "step-000000006.pt"
    checkpoints(run)[-1].unlink()
    assert last_checkpoint(run)["step"] < 6
    train(tiny_training(made_cache, run, epochs=LONG))
    assert rates(run) == rates(longer)
    assert_same(run, longer)


def test_an_unfinished_run_and_a_second_time(made_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    train(tiny_training(made_cache, run, epochs=SHORT, steps=4))
    train(tiny_training(made_cache, run, epochs=3, steps=8), extend=True)
    train(tiny_training(made_cache, run, epochs=LONG), extend=True)
    found = load_settings(run)["extensions"]
    assert [(one["from_step"], one["from_epochs"], one["to_epochs"]) for one in found] == [(4, 2, 3), (8, 3, 5)]
    wanted = schedule(2, range(4)) + schedule(3, range(4, 8)) + schedule(5, range(8, 15))
    assert rates(run) == pytest.approx(wanted)


def test_shorter_than_what_is_done_is_refused_and_a_mistake_can_be_taken_back(
    made_cache: Path, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "r"))
    train(tiny_training(made_cache, run, epochs=40, steps=10), extend=True)
    before = files_below(run)
    with pytest.raises(ConfigError, match=r"--epochs 3: this run has done 3\.33333 epochs already") as error:
        train(tiny_training(made_cache, run, epochs=3), extend=True)
    assert files_below(run) == before
    assert error.value.todo.startswith("give at least 4")
    assert train(tiny_training(made_cache, run, epochs=4), extend=True).steps == 12
    assert rates(run)[10:] == pytest.approx(schedule(4, range(10, 12)))


def test_there_must_be_a_run_and_no_overwrite(made_cache: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run here yet"):
        train(tiny_training(made_cache, tmp_path / "r"), extend=True)
    assert not (tmp_path / "r").exists()
    before = files_below(finished)
    with pytest.raises(ConfigError, match="--extend and --overwrite"):
        train(tiny_training(made_cache, finished, epochs=LONG), extend=True, overwrite=True)
    train(tiny_training(made_cache, finished, epochs=LONG), extend=True, dry_run=True)
    assert files_below(finished) == before


def test_a_run_before_its_first_checkpoint(made_cache: Path, finished: Path, longer: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "r"))
    shutil.rmtree(run / "checkpoints")
    train(tiny_training(made_cache, run, epochs=LONG), extend=True)
    assert rates(run) == pytest.approx(schedule(LONG, range(LONG * PER_EPOCH)))
    assert load_settings(run)["extensions"][0]["from_step"] == 0
