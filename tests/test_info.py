"""`info` says what a place is: a cache, a pack, a run, an export, or something else."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import cli
from pipelines.describing.command_words import option_words
from pipelines.describing.info_run import speed_of
from pipelines.export import export
from pipelines.info import info
from pipelines.pack import pack
from pipelines.terminal.info_texts import text_of
from pipelines.terminal.texts import smaller_batch
from pipelines.train import train
from tec_cache.base.load import load_base
from tec_cache.config import TrainConfig
from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.kinds import Kind, contents, what_is
from tec_cache.run.metrics import read_metrics
from tests.conftest import TINY, tiny_training
from tests.test_imports import loaded_by


@pytest.fixture(scope="module")
def run(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, stopped after the fourth of its six steps."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    train(tiny_training(made_cache, folder, epochs=2, steps=4, log_every=1, views=1, tau=0.7))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exports") / "e")


def test_a_cache_and_a_pack(made_cache: Path, tmp_path: Path) -> None:
    pack(str(made_cache), str(tmp_path / "p"))
    for place, kind in ((made_cache, "cache"), (tmp_path / "p", "pack")):
        for path in (str(place), f"file://{place}"):
            found = info(path)
            assert (found["kind"], found["num_views"], list(found["targets"])) == (kind, 2, ["tiny"])
        assert "97 photos" in text_of(found)


def test_a_run_that_can_go_on(run: Path, made_cache: Path) -> None:
    found = info(str(run))
    assert (found["kind"], found["step"], found["total_steps"], found["finished"]) == ("run", 4, 6, False)
    assert found["config"]["student_args"] == TINY
    assert [of["name"] for of in found["targets"]] == ["tiny"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert {name: logged[name] for name in ("loss", "feature", "attention")} == {
        name: found["logged"][name] for name in ("loss", "feature", "attention")
    }
    assert found["images_per_second"] == logged["images_per_second"]
    text = text_of(found)
    for part in (f"run          {run}", "vit_tiny_patch16_224 (", "embed_dim 48", "target set tiny", str(made_cache),
                 "steps        4 of 6: not finished", f"loss {logged['loss']:.4f}", "images/s"):  # fmt: skip
        assert part in text


def test_a_run_is_described_without_torch(run: Path) -> None:
    """It is asked for again and again while a run goes on: torch alone takes three quarters of the time."""
    assert "torch" not in loaded_by(f"from pipelines.info import info; info({str(run)!r})")


def test_speed_now_over_the_last_minute_and_the_time_left() -> None:
    def line(images_per_second: float, seconds: float) -> dict[str, float]:
        return {"images_per_second": images_per_second, "waited": 0.1, "seconds": seconds}

    slow, fast = line(10, 600), line(100, 20)
    found = speed_of([slow, fast, fast, fast, line(40, 20)], images_left=8_500)
    assert found["images_per_second"] == 40
    assert found["minute_images_per_second"] == pytest.approx((2000 + 2000 + 800) / 60), "the last 60 seconds"
    assert found["seconds_left"] == pytest.approx(8_500 * 60 / 4800)
    assert speed_of([slow, fast], 100)["minute_images_per_second"] == pytest.approx(8000 / 620)
    assert speed_of([], 5) == {}
    assert speed_of([fast, {"step": 3, "test_top1": 0.5}], 5) == {}, "a judgement before the first step has no speed"


def test_an_unfinished_run_says_how_long_the_rest_takes(run: Path) -> None:
    found = info(str(run))
    lines = read_metrics(run)
    images = sum(line["images_per_second"] * line["seconds"] for line in lines)
    assert images == pytest.approx(4 * 32)
    assert found["seconds_left"] == pytest.approx(2 * 32 * sum(line["seconds"] for line in lines) / images)
    text = text_of(found)
    assert "images/s at the last line, " in text
    assert " over the last minute; " in text
    assert "time left    " in text
    assert "last line    " in text
    assert found["logged_seconds_ago"] >= 0


def test_the_command_that_it_prints_goes_on_and_finishes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "a copy"
    shutil.copytree(run, copy)
    words = shlex.split(info(str(copy))["go_on"])
    assert "--steps" not in words, "it has done those"
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code, capsys.readouterr().err
    found = info(str(copy))
    assert (found["step"], found["finished"]) == (6, True)
    assert f"tec-cache export '{copy}' OUT" in text_of(found)


@pytest.mark.parametrize(
    "changes",
    [{}, {"pixels": True}, {"online": "mae", "base_weights": "a b.pth", "k": "0"},
     {"beta1": 0.85, "warmup_epochs": 1.5},
     {"probe_every": 2, "probe_train": "a b.tar", "probe_test": "t", "probe_limit": 9, "probe_neighbours": 5},
     {"student_args": {"depth": 3, "act_layer": "gelu", "x": "3", "qkv_bias": False}, "partial": True, "views": 2}],
)  # fmt: skip
def test_a_command_means_the_settings_that_it_was_made_from(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pipelines.train

    seen: list[TrainConfig] = []

    def remember(config: TrainConfig, **_: Any) -> None:
        seen.append(config)
        raise ConfigError("enough")

    config = TrainConfig(**({"cache": "the cache", "out": "r"} | changes))
    monkeypatch.setattr(pipelines.train, "train", remember)
    monkeypatch.setattr("sys.argv", ["tec-cache", "train", *option_words(TrainConfig, dataclasses.asdict(config))])
    with pytest.raises(SystemExit):
        cli.main()
    assert seen == [config], capsys.readouterr().err


def test_a_run_without_a_checkpoint_and_one_with_half_a_line(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "r"
    shutil.copytree(run, copy)
    with (copy / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    assert info(str(copy))["logged"]["step"] == 4
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.jsonl").unlink()
    found = info(str(copy))
    assert (found["step"], found["logged"]) == (0, {})
    assert "0 of 6: no checkpoint yet" in text_of(found)


def test_an_export(exported: Path, run: Path) -> None:
    found = info(str(exported))
    assert (found["kind"], found["architecture"], found["step"]) == ("export", "vit_tiny_patch16_224", 4)
    assert found["weights_sha256"] == load_base(str(exported), grid=4, k=None).identity["weights_sha256"]
    assert found["run"] == str(run)
    text = text_of(found)
    for part in (found["weights_sha256"], f"step 4 of run {run}", "target set tiny", "embed_dim 48", "mean [0.485"):
        assert part in text


def test_an_export_whose_weights_are_damaged(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "e"
    shutil.copytree(exported, copy)
    (copy / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(TecCacheError):
        info(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(TecCacheError):
        info(str(copy))


BAD_JSON = ["", "[]", "3", "{", "{}", '{"config": 3}', '{"config": [], "targets": {}, "cache": "c", "num_views": 1}',
            '{"config": {}, "targets": {}, "cache": 7, "num_views": 1}', "[" * 100_000, '"\\ud800"', "\xff",
            '{"format": 4, "config": {}, "targets": {}, "num_views": "many", "total_steps": 1}']  # fmt: skip


@pytest.mark.parametrize("text", BAD_JSON, ids=range(len(BAD_JSON)))
def test_settings_of_a_run_that_are_not_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("latin-1", "replace"))
    with pytest.raises(TecCacheError, match=r"run.json is damaged") as error:
        info(str(tmp_path))
    assert error.value.where == str(tmp_path / "run.json")


@pytest.mark.parametrize("tec_cache", [None, 3, [], {}, {"settings": {}}, {"step": "x", "settings": {"config": {}}}])
def test_a_configuration_of_an_export_that_is_not_ours(tec_cache: Any, tmp_path: Path) -> None:
    config = {"architecture": "vit", "model_args": {}, "pretrained_cfg": {}, "tec_cache": tec_cache}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TecCacheError, match="cannot be understood"):
        info(str(tmp_path))


def test_something_else_is_named(tmp_path: Path, shards: Path, tiny_base: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    found = {str(shards): "a folder of 3 .tar", str(tiny_base): "a folder of 1 .safetensors, 1 .json",
             str(file): "a file", str(tmp_path / "empty"): "an empty folder"}  # fmt: skip
    for place, said in found.items():
        assert what_is(place) is Kind.OTHER
        parts = set(re.findall(r"\d \.\w+|a file|an empty folder", contents(Path(place))))
        assert parts == set(re.findall(r"\d \.\w+|a file|an empty folder", said))
        with pytest.raises(ConfigError, match="this is no cache, pack, run, export or rounds, but"):
            info(place)


@pytest.mark.parametrize("place", ["nowhere", "memory://nowhere"])
def test_nothing_is_nothing(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert what_is(place) is Kind.NOTHING
    with pytest.raises(ConfigError, match=r"there is (no cache|nothing) here"):
        info(place)


def test_a_run_that_has_logged_more_than_it_saved(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        checkpoint.unlink()
    text = text_of(info(str(copy)))
    assert "steps        4 of 6 logged; last checkpoint: none yet" in text
    assert "to go on, unless it is running\n  tec-cache train --out " in text


def test_the_command_that_comes_next_fits_the_photos() -> None:
    assert [smaller_batch(photos) for photos in (0, 1, 48, 4095, 4096, 10**6)] == [
        "", " --batch-size 1", " --batch-size 32", " --batch-size 2048", "", ""
    ]  # fmt: skip
