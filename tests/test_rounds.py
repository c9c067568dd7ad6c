"""Round after round: the chain is what its commands give by hand, goes on where it was killed, removes only its own."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
import pipelines.chaining.estimate
import pipelines.rounds
from pipelines.chaining.journal import Journal
from pipelines.describing.command_words import option_words
from pipelines.extract import extract
from pipelines.info import info
from pipelines.remove import remove
from pipelines.reporting.subjects import open_subjects
from pipelines.rounds import RoundsSummary, rounds
from pipelines.terminal.info_texts import text_of
from pipelines.terminal.rounds_texts import rounds_text
from pipelines.train import train
from tec_cache.cache.opening import open_cache
from tec_cache.config import ExtractConfig
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, IdentityError, TecCacheError
from tec_cache.kinds import Kind
from tec_cache.rounds_config import RoundsConfig
from tec_cache.run.metrics import read_metrics
from tec_cache.run.settings import load_settings
from tests import forked, launch
from tests.conftest import files_below, last_checkpoint, tiny_config, tiny_training, write_shards

KILLS = 20
TRAIN = {"epochs": 2, "batch_size": 8, "warmup_epochs": 1.0}
EXTRACT = {"k": "3", "quality": "exact", "batch_size": 8, "device": "cpu", "threads": 1, "workers": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("few"), [10, 7])


@pytest.fixture(scope="module")
def small_cache(photos: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 photos in three units, two views, one target set."""
    cache = tmp_path_factory.mktemp("small") / "cache"
    extract(tiny_config(photos, cache, tiny_base, group_size=8))
    return cache


def chain(folder: Path, *, training: dict[str, Any] | None = None, **changes: Any) -> RoundsConfig:
    """Three rounds of tiny models in FOLDER/chain, over FOLDER/cache."""
    cache = folder / "cache"
    train = tiny_training(cache, folder / "chain", **(TRAIN | (training or {})))
    target = () if changes.get("pixels") else ("tiny",)
    settings: dict[str, Any] = {"rounds": 3, "seconds": 1.0, "target": target} | changes
    extraction = ExtractConfig(cache=str(cache), **settings.pop("extract", EXTRACT))
    return RoundsConfig(train=train, extract=extraction, **settings)


def begun(cache: Path, folder: Path) -> Path:
    """A folder with a copy of the cache, at the same path whenever it is asked for: paths stand in what is written."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(cache, folder / "cache")
    return folder


def results(folder: Path) -> dict[str, Any]:
    """All that two equal chains have in common: exports, cache and rounds.json but for its hours; runs by content."""
    found: dict[str, Any] = {f"cache/{n}": d for n, d in files_below(folder / "cache").items() if n != ".lock"}
    for number in range(3):
        export, run = (folder / "chain" / f"round-{number:02d}" / name for name in ("export", "run"))
        found |= {f"{number} {name}": data for name, data in files_below(export).items()}
        if run.exists():
            found[f"{number} run"] = load_settings(run)
            found[f"{number} model"] = {n: v.numpy().tobytes() for n, v in last_checkpoint(run)["model"].items()}
            numbers = [{n: v for n, v in line.items() if n not in ("images_per_second", "waited", "seconds")}
                       for line in read_metrics(run)]  # fmt: skip
            found[f"{number} metrics"] = numbers
    journal = folder / "chain" / "rounds.json"
    if journal.exists():
        said = json.loads(journal.read_text())
        for one in said["rounds"]:
            assert set(one.pop("hours")) <= {"extract", "train"}
        found["rounds.json"] = said
    return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], *, without: tuple[str, ...] = ()) -> None:
    names = set(theirs) - set(without)
    assert set(ours) - set(without) == names
    assert not [name for name in sorted(names) if ours[name] != theirs[name]]


@pytest.fixture(scope="module")
def whole(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], RoundsSummary]:
    """Where chains of this module run, what an undisturbed one leaves, and what it says."""
    folder = begun(small_cache, tmp_path_factory.mktemp("chains") / "here")
    summary = rounds(chain(folder))
    return folder, results(folder), summary


@pytest.fixture(scope="module")
def standing(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished chain that no test changes."""
    folder = begun(small_cache, tmp_path_factory.mktemp("standing") / "here")
    rounds(chain(folder))
    return folder


def test_three_rounds_leave_three_models_and_the_last_target_set(
    whole: tuple[Path, dict[str, Any], RoundsSummary],
) -> None:
    _, found, summary = whole
    assert summary.finished
    assert summary.commands == []
    assert [one["target"] for one in summary.rounds] == [None, "chain-round-01", "chain-round-02"]
    assert [one["removed"] for one in summary.rounds] == [False, True, False]
    # 17 photos in two views, and 32 of those again by which the codec is judged
    assert [one["base_calls"] for one in summary.rounds] == [0, 34 + 32, 34 + 32]
    assert [one["steps"] for one in summary.rounds] == [4, 4, 4]
    assert all(set(one["losses"]) == {"loss", "feature", "attention"} for one in summary.rounds)
    assert all(one["hours"]["train"] > 0 for one in summary.rounds)
    sets = {name.split("/")[2] for name in found if name.startswith("cache/targets/")}
    assert sets == {"tiny", "chain-round-02"}
    models = [found[f"{number} model.safetensors"] for number in range(3)]
    assert len(set(models)) == 3
    seeds = [found[f"{number} run"]["config"]["seed"] for number in range(3)]
    assert seeds == [0, 1, 2], "no round begins with the random weights of the one that it learns from"


@pytest.mark.parametrize(
    "changes",
    [{}, {"start": "previous", "pixels": True, "keep": 0}, {"start": "previous", "keep": 5, "name": "mine"}],
    ids=["random", "pixels", "previous"],
)
def test_the_chain_is_what_its_commands_give_by_hand(
    small_cache: Path, tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Including the target sets, the order in which they go, and the weights that a round starts from."""
    config = chain(begun(small_cache, tmp_path / "here"), **changes)
    commands = rounds(config, dry_run=True).commands
    kinds = [shlex.split(command)[1] for command in commands]
    assert [kind for kind in kinds if kind != "rm"] == ["train", "export", *["extract", "train", "export"] * 2]
    for command in commands:
        cli.cli.main(shlex.split(command)[1:], standalone_mode=False)
    by_hand = results(tmp_path / "here")
    config = chain(begun(small_cache, tmp_path / "here"), **changes)
    assert rounds(config).finished
    assert_same(results(tmp_path / "here"), by_hand, without=("rounds.json",))
    inits = [by_hand[f"{number} run"].get("init") for number in range(3)]
    if changes.get("start") == "previous":
        assert inits[0] is None
        assert [init["kind"] for init in inits[1:]] == ["run", "run"]
        assert inits[2]["random"] == [], "all of a model of the same targets goes on"
        random_heads = ["feature head", "attention head"] if changes.get("pixels") else []
        assert inits[1]["random"] == random_heads
    else:
        assert inits == [None] * 3


@pytest.mark.parametrize(("keep", "left"), [(0, []), (1, ["02"]), (2, ["01", "02"])])
def test_keep(small_cache: Path, tmp_path: Path, keep: int, left: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A set goes when the round after it has finished, so that a cache holds keep + 1 of them at most."""
    folder, most = begun(small_cache, tmp_path / "here"), []

    def own() -> list[str]:
        return [name for name in open_cache(folder / "cache").target_names if name.startswith("chain-")]

    def watched(config: Any, **options: Any) -> Any:
        most.append(len(own()))
        return train(config, **options)

    monkeypatch.setattr(pipelines.rounds, "train", watched)
    summary = rounds(chain(folder, keep=keep, training={"epochs": 1, "warmup_epochs": 0.5}))
    assert own() == [f"chain-round-{number}" for number in left]
    assert [one["removed"] for one in summary.rounds][1:] == [f"chain-round-0{n}" not in own() for n in (1, 2)]
    assert most == [0, 1, 1 if keep == 0 else 2]
    assert "tiny" in open_cache(folder / "cache").target_names


class Crashed(Exception):
    """What stands for a kill."""


def test_a_call_that_was_done_and_not_written_down_is_made_again_to_the_same_end(
    whole: tuple[Path, dict[str, Any], RoundsSummary], small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one of them: a crash between each call's end and the moment at which rounds.json says so."""
    folder, undisturbed, _ = whole
    begun(small_cache, folder)
    write, crashed = Journal.finished, list[str]()

    def finished(self: Journal, call: str) -> None:
        if call not in crashed:
            crashed.append(call)
            raise Crashed
        write(self, call)

    monkeypatch.setattr(Journal, "finished", finished)
    for _ in undisturbed["rounds.json"]["done"]:
        with pytest.raises(Crashed):
            rounds(chain(folder))
    assert rounds(chain(folder)).finished
    assert crashed == undisturbed["rounds.json"]["done"]
    assert len(crashed) == 11
    assert_same(results(folder), undisturbed)


def make(folder: Path) -> None:
    torch.set_num_threads(1)
    rounds(chain(folder))


def killed_often(start: Callable[[], Any], folder: Path, seconds: float, kills: int, seed: int) -> list[int]:
    """Start a chain, kill it at a random moment, and so on; return how many calls were done at each kill.

    seconds: what the whole chain takes. Every start comes a little further than the one before, or not.
    """
    draw, found = random.Random(seed), []
    journal = folder / "chain" / "rounds.json"
    while len(found) < kills:
        before = journal.stat().st_mtime_ns if journal.exists() else 0
        process = start()
        while process.is_alive() and (not journal.exists() or journal.stat().st_mtime_ns == before):
            time.sleep(0.001)  # it has not begun: loading torch takes a while
        end = time.monotonic() + draw.uniform(0, seconds / 6)
        while time.monotonic() < end and process.is_alive():
            time.sleep(0.001)
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found.append(len(json.loads(journal.read_text())["done"]) if journal.exists() else 0)
    return found


@pytest.mark.parametrize("kills", [4, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_at_random_moments_equals_undisturbed(
    whole: tuple[Path, dict[str, Any], RoundsSummary], small_cache: Path, kills: int
) -> None:
    folder, undisturbed, _ = whole
    begun(small_cache, folder)
    begin = time.monotonic()
    job = forked.start(make, folder)
    job.join()
    seconds = time.monotonic() - begin
    assert job.exitcode == 0
    met: list[int] = []
    for seed in range(50):  # a chain may end before it was killed so often: then the next one gets the rest
        begun(small_cache, folder)
        met += killed_often(lambda: forked.start(make, folder), folder, seconds, kills - len(met), seed)
        rounds(chain(folder))
        assert_same(results(folder), undisturbed)
        if len(met) == kills:
            break
    assert len(met) == kills
    if kills == KILLS:
        assert len(set(met)) > 4, f"the kills met the chain in few places: {met}"


class Command:
    """`tec-cache rounds` as a process of its own."""

    def __init__(self, config: RoundsConfig, *more: str) -> None:
        given = {n: v for n, v in vars(config).items() if n not in ("train", "extract", "seconds")}
        words = ["rounds", *option_words(RoundsConfig, given)]
        words += option_words(type(config.train), vars(config.train))
        words += ["--k", "3", "--quality", "exact", "--base-batch-size", "8"]
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "tec-cache"), *words, *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=launch.environment(),
        )  # fmt: skip
        self.pid = self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def join(self) -> None:
        self.said = self.process.communicate(timeout=launch.TIMEOUT)


def started(folder: Path, training: dict[str, Any] | None = None) -> Callable[[], Command]:
    return lambda: Command(chain(folder, training={"workers": 2} | (training or {})))


@pytest.mark.slow
def test_the_command_killed_twenty_times_equals_undisturbed(small_cache: Path, tmp_path: Path) -> None:
    folder = begun(small_cache, tmp_path / "here")
    command = started(folder)()
    command.join()
    assert command.process.returncode == 0, command.said
    undisturbed = results(folder)
    said = json.loads((folder / "chain" / "rounds.json").read_text())
    seconds = 3600 * sum(sum(one["hours"].values()) for one in said["rounds"])
    met: list[int] = []
    for seed in range(KILLS):
        begun(small_cache, folder)
        met += killed_often(started(folder), folder, seconds, KILLS - len(met), seed)
        last = started(folder)()
        last.join()
        assert last.process.returncode == 0, last.said
        assert_same(results(folder), undisturbed)
        if len(met) == KILLS:
            break
    assert len(met) == KILLS
    assert len(set(met)) > 2, met


def test_a_signal_keeps_what_is_done_and_prints_the_command_that_goes_on(
    whole: tuple[Path, dict[str, Any], RoundsSummary], small_cache: Path
) -> None:
    folder, _, _ = whole
    begun(small_cache, folder)
    command = started(folder, {"epochs": 200})()
    checkpoints = folder / "chain" / "round-00" / "run" / "checkpoints"
    while command.is_alive() and not checkpoints.exists():
        time.sleep(0.01)
    command.process.send_signal(signal.SIGTERM)
    command.join()
    out, err = command.said
    assert command.process.returncode == 130, err
    assert "interrupted: what is finished is kept; go on with\n  tec-cache rounds --target tiny --rounds 3" in out
    assert json.loads((folder / "chain" / "rounds.json").read_text())["done"] == []
    assert list(checkpoints.glob("step-*.pt"))


def test_a_dry_run_writes_nothing_and_says_disk_and_hours(small_cache: Path, tmp_path: Path) -> None:
    folder = begun(small_cache, tmp_path / "here")
    before = files_below(folder)
    summary = rounds(chain(folder, keep=2), dry_run=True)
    assert files_below(folder) == before
    assert not (folder / "chain").exists()
    found = summary.estimate
    assert found is not None
    assert (found["trainings"], found["extractions"], found["sets_at_once"]) == (3, 2, 2)
    assert found["hours"] == pytest.approx(3 * found["hours_training"] + 2 * found["hours_extraction"])
    assert found["hours_training"] > 0
    assert found["fits"] is True
    kept = open_cache(folder / "cache")["tiny"]
    assert found["bytes_set"] == pytest.approx(bytes_of(folder, "tiny"), rel=0.2), kept.name
    text = rounds_text(summary, True, "")
    assert "3 trainings of" in text
    assert "dry run: nothing was written" in text
    assert text.count("  tec-cache train --") == 3
    rounds(chain(folder, rounds=1))
    left = rounds(chain(folder), dry_run=True)
    assert left.estimate is not None
    assert (left.estimate["trainings"], left.estimate["extractions"]) == (2, 2)
    assert [shlex.split(command)[1] for command in left.commands][:2] == ["extract", "train"]


def bytes_of(folder: Path, name: str) -> int:
    """Bytes of a target set's payloads and records."""
    places = (folder / "cache" / "targets" / name, folder / "cache" / "records" / "targets" / name)
    return sum(path.stat().st_size for place in places for path in place.rglob("*.*") if path.name != "target.json")


def test_a_disk_that_is_too_small_is_said_beforehand(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(small_cache, tmp_path / "here")
    least = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(pipelines.chaining.estimate.shutil, "disk_usage", lambda _: least)
    summary = rounds(chain(folder), dry_run=True)
    assert summary.estimate is not None
    assert summary.estimate["fits"] is False
    assert "IT DOES NOT FIT" in rounds_text(summary, True, "")


def test_info_says_how_far_they_are_and_a_report_shows_their_runs(standing: Path, tmp_path: Path) -> None:
    found = info(str(standing / "chain"))
    assert found["kind"] == "rounds"
    assert found["first"] == "tiny:1"
    assert [one["target"] for one in found["rounds"]] == [None, "chain-round-01", "chain-round-02"]
    assert found["done"][-1] == "round-02 rm"
    text = text_of(found)
    assert "round-02 rm the last" in text
    assert "chain-round-01 (removed)" in text
    subjects = open_subjects([str(standing / "chain"), str(standing / "cache")])
    assert [subject.kind for subject in subjects] == [Kind.RUN] * 3 + [Kind.CACHE]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "rounds.json").write_text('{"format": 1, "rounds": 3}')
    with pytest.raises(TecCacheError, match="damaged"):
        info(str(damaged))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"epochs": 3}}, r"train\.epochs: stored 2, asked 3"),
        ({"training": {"seed": 1}}, r"train\.seed"),
        ({"training": {"tau": 2.0}}, r"tau: stored null, asked 2"),
        ({"start": "previous"}, r'start: stored "random", asked "previous"'),
        ({"name": "other"}, r'name: stored "chain", asked "other"'),
        ({"pixels": True}, r"pixels: stored false, asked true"),
        ({"extract": EXTRACT | {"k": "2"}}, r'extract\.k: stored "3", asked "2"'),
    ],
)
def test_other_settings_are_refused_with_the_fields(standing: Path, changes: dict[str, Any], message: str) -> None:
    folder = standing
    before = results(folder)
    with pytest.raises(IdentityError, match=message):
        rounds(chain(folder, **changes))
    assert_same(results(folder), before)


def test_more_rounds_go_on_and_fewer_are_refused(
    whole: tuple[Path, dict[str, Any], RoundsSummary], small_cache: Path
) -> None:
    """One round and then two more equal three at once."""
    folder, undisturbed, _ = whole
    begun(small_cache, folder)
    assert len(rounds(chain(folder, rounds=1)).rounds) == 1
    assert "chain-round-01" not in open_cache(folder / "cache").target_names
    assert rounds(chain(folder)).finished
    assert_same(results(folder), undisturbed)
    with pytest.raises(ConfigError, match="--rounds 2, of which more were begun"):
        rounds(chain(folder, rounds=2))
    assert rounds(chain(folder, keep=3)).finished


def test_a_set_that_something_else_made_is_never_taken_for_a_rounds(
    small_cache: Path, tmp_path: Path, tiny_base: Path
) -> None:
    folder = begun(small_cache, tmp_path / "here")
    extract(tiny_config(None, folder / "cache", tiny_base, name="chain-round-02"))
    before = files_below(folder)
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="'chain-round-02' that these rounds did not make"):
            rounds(chain(folder), dry_run=dry_run)
    assert files_below(folder) == before
    assert rounds(chain(folder, name="mine")).finished


def test_a_set_that_was_begun_with_another_model_is_refused(small_cache: Path, tmp_path: Path, tiny_base: Path) -> None:
    """Even under a name that these rounds have written down: its identity holds the hash of its base."""
    folder = begun(small_cache, tmp_path / "here")
    rounds(chain(folder, rounds=1))
    extract(tiny_config(None, folder / "cache", tiny_base, name="chain-round-01"))
    journal = folder / "chain" / "rounds.json"
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"sets": ["chain-round-01"]}))
    with pytest.raises(IdentityError, match=r"base\.weights_sha256"):
        rounds(chain(folder))


def test_a_folder_of_something_else_is_refused(small_cache: Path, tmp_path: Path) -> None:
    folder = begun(small_cache, tmp_path / "here")
    (folder / "chain").mkdir()
    (folder / "chain" / "notes.txt").write_text("mine")
    before = files_below(folder)
    with pytest.raises(TecCacheError, match=r"something else than rounds of tec-cache: 1: notes\.txt"):
        rounds(chain(folder))
    assert files_below(folder) == before
    (folder / "chain" / "notes.txt").unlink()
    (folder / "chain" / "rounds.json").write_text('{"format": 1, "settings": 3}')
    with pytest.raises(TecCacheError, match=r"rounds\.json is damaged"):
        rounds(chain(folder))
    (folder / "chain" / "rounds.json").write_text('{"format": 2}')
    with pytest.raises(TecCacheError, match="these rounds are of format 2"):
        rounds(chain(folder))


def test_what_lies_in_an_exports_place_is_not_replaced(small_cache: Path, tmp_path: Path) -> None:
    folder = begun(small_cache, tmp_path / "here")
    rounds(chain(folder, rounds=1))
    export = folder / "chain" / "round-00" / "export"
    document = json.loads((export / "config.json").read_text())
    document["tec_cache"]["step"] = 3
    (export / "config.json").write_text(json.dumps(document))
    journal = folder / "chain" / "rounds.json"
    done = json.loads(journal.read_text())
    journal.write_text(json.dumps(done | {"done": ["round-00 train"]}))
    with pytest.raises(TecCacheError, match="there is an export here already"):
        rounds(chain(folder, rounds=1))


def test_views_that_were_added_meanwhile_are_not_used(
    whole: tuple[Path, dict[str, Any], RoundsSummary], small_cache: Path, photos: Path, tiny_base: Path
) -> None:
    folder, undisturbed, _ = whole
    begun(small_cache, folder)
    rounds(chain(folder, rounds=1))
    extract(tiny_config(photos, folder / "cache", tiny_base, group_size=8, views=3))
    rounds(chain(folder))
    assert results(folder)["2 model.safetensors"] == undisturbed["2 model.safetensors"]


def test_probes_stand_in_the_table(small_cache: Path, tmp_path: Path, photos: Path) -> None:
    folder = begun(small_cache, tmp_path / "here")
    judged = {"probe_every": 2, "probe_train": str(photos), "probe_test": str(photos), "probe_neighbours": 3}
    summary = rounds(chain(folder, training=judged, rounds=2))
    for one in summary.rounds:
        assert set(one["scores"]) == {"step", "probe_knn", "probe_linear"}
        assert one["scores"]["step"] == 4
    lines = rounds_text(summary, False, "").splitlines()
    (head,) = [line for line in lines if line.startswith("round ")]
    assert head.split() == ["round", "learned", "from", "loss", "kNN", "linear", "targets", "base", "calls", "time"]
    (last,) = [line for line in lines if line.startswith("1 ")]
    assert f"{summary.rounds[1]['scores']['probe_knn']:.2%}" in last
    assert " 66 " in last
    assert json.loads((folder / "chain" / "rounds.json").read_text())["rounds"] == summary.rounds


def test_what_rounds_do_not_take_is_refused(small_cache: Path, tmp_path: Path) -> None:
    folder = begun(small_cache, tmp_path / "here")
    with pytest.raises(ConfigError, match="rounds run in one process") as error:
        rounds(chain(folder), ranks=Ranks(rank=1, world_size=2))
    assert "--dry-run" in error.value.todo
    for name, value in (("init", "base"), ("steps", 3), ("target", ("tiny",)), ("k", "2")):
        with pytest.raises(ConfigError, match=f"rounds have no setting {name} of a training"):
            chain(folder, training={name: value})
    with pytest.raises(ConfigError, match="--target and --pixels"):
        chain(folder, pixels=True, target=("tiny",))
    with pytest.raises(ConfigError, match="not used: --keep; a single round makes no target set"):
        chain(folder, rounds=1, keep=2)
    with pytest.raises(ConfigError, match="there is no target set 'none'"):
        rounds(chain(folder, target=("none",)))
    remove(str(folder / "cache"), target="tiny")
    with pytest.raises(ConfigError, match="the cache has 0 target sets"):
        rounds(chain(folder, target=()))
    assert not (folder / "chain").exists()
