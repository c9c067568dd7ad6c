"""An option is given once, a setting that is given is used, and ~ is a home folder: for every command and config."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import cli
from pipelines.terminal.options import read_settings
from pipelines.train import train
from pipelines.verify import verify
from tec_cache.conditions import USED, require_used
from tec_cache.config import ExtractConfig, PlanConfig, ProbeConfig, TrainConfig, read_toml
from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.fields import is_place
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.paths import expanded
from tec_cache.rounds_config import RoundsConfig
from tec_cache.segment.config import SegmentConfig
from tests.conftest import tiny_training

EVERY = (ExtractConfig, TrainConfig, ProbeConfig, PlanConfig, FinetuneConfig, SegmentConfig, RoundsConfig)
CONFIGS: dict[str, Any] = {c.__name__: c for c in EVERY}
LEAST: dict[type, dict[str, Any]] = {
    ExtractConfig: {"cache": "c"},
    TrainConfig: {"cache": "c", "out": "r"},
    ProbeConfig: {"model": "m", "train": "a", "test": "b"},
    FinetuneConfig: {"model": "m", "train": "a", "test": "b", "out": "r"},
    SegmentConfig: {"model": "m", "train": "a", "test": "b", "out": "r"},
}


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["tec-cache", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out + err


SINGLE = [
    (name, parameter.opts[0], parameter.nargs, parameter.type)
    for name, command in sorted(cli.cli.commands.items())
    for parameter in command.params
    if isinstance(parameter, click.Option) and not parameter.is_flag and not parameter.multiple
]


@pytest.mark.parametrize(("name", "option", "nargs", "kind"), SINGLE, ids=[f"{n} {o}" for n, o, _, _ in SINGLE])
def test_every_option_that_takes_one_value_is_given_once(
    name: str, option: str, nargs: int, kind: click.ParamType, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    first, second = (["0.5"] * nargs, ["0.75"] * nargs) if kind is click.FLOAT else (["11"], ["12"])
    code, text = told(capsys, monkeypatch, name, "x", "y", option, *first, option, *second)
    assert code == 2
    assert f"{option} was given twice ({' '.join(first)} and {' '.join(second)})" in text


def test_the_same_value_twice_and_both_spellings_count_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["--views", "2", "--views=2"], ["--views=2", "--views=3"]):
        assert "--views was given twice" in told(capsys, monkeypatch, "extract", "--cache", "c", *words)[1]


def test_lists_may_be_repeated_but_name_nothing_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = ["--student-arg", "depth=3", "--student-arg", "num_heads=2", "--student-arg", "depth=4"]
    code, text = told(capsys, monkeypatch, "train", "--cache", "c", "--out", "r", *twice)
    assert (code, "--student-arg depth was given twice: 3 and 4" in text) == (2, True)
    code, text = told(capsys, monkeypatch, "train", "--cache", "c", "--out", "r", *twice[:4])
    assert "there is no cache here" in text


def test_a_file_sets_nothing_twice(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("batch-size = 2\nbatch_size = 3\n")
    with pytest.raises(ConfigError, match="batch_size was given twice"):
        read_toml(file, TrainConfig)
    file.write_text("views = 2\nviews = 3\n")
    with pytest.raises(ConfigError, match="cannot read the settings"):
        read_toml(file, ExtractConfig)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_has_its_condition(name: str) -> None:
    assert set(USED[name]) == {field.name for field in dataclasses.fields(CONFIGS[name])}


UNUSED: list[tuple[type, dict[str, Any], dict[str, Any]]] = [
    *((ExtractConfig, {"input": "p", "views_only": True}, {name: value}) for name, value in {
        "base": "mae", "base_weights": "w", "name": "n", "k": "3", "normalization": "patch", "last_layers": 2,
        "quality": "default", "fit_views": 512, "batch_size": 64, "threads": 1, "precision": "float32", "device": "cpu",
    }.items()),
    (ExtractConfig, {"input": "p", "base": "mae", "crop": "center"}, {"scale": (0.2, 1.0)}),
    (ExtractConfig, {"input": "p", "base": "mae", "crop": "center"}, {"flip": 0.5}),
    (ExtractConfig, {"input": "p", "base": "mae", "quality": "exact"}, {"fit_views": 64}),
    (ExtractConfig, {"input": "p", "base": "mae", "device": "cuda:1"}, {"threads": 4}),
    (ExtractConfig, {"base": "mae"}, {"limit": 5}),
    (ExtractConfig, {"base": "mae"}, {"on_error": "skip"}),
    *((TrainConfig, {"pixels": True}, {name: value}) for name, value in {
        "tau": 2.0, "k": "3", "base_weights": "w", "normalization": "patch", "last_layers": 2, "attention_weight": 2.0,
    }.items()),
    (TrainConfig, {"k": "none"}, {"tau": 2.0}),
    (TrainConfig, {"k": "none"}, {"attention_weight": 0.5}),
    (TrainConfig, {}, {"base_weights": "w"}),
    (TrainConfig, {}, {"stage_bytes": "1GB"}),
    (TrainConfig, {}, {"probe_limit": 100}),
    (TrainConfig, {}, {"probe_neighbours": 5}),
    (TrainConfig, {"decoder_depth": 0}, {"decoder_heads": 4}),
    (TrainConfig, {"device": "cuda"}, {"threads": 4}),
    (ProbeConfig, {"model": "random:mae"}, {"weights": "w"}),
    (FinetuneConfig, {"model": "random:mae"}, {"weights": "w"}),
    (FinetuneConfig, {}, {"adapters_from": "random"}),
    (FinetuneConfig, {"tune": "head"}, {"layer_decay": 0.5}),
    (FinetuneConfig, {"tune": "adapters"}, {"drop_path": 0.1}),
    (FinetuneConfig, {"optimizer": "adamw"}, {"momentum": 0.9}),
    (FinetuneConfig, {"optimizer": "sgd"}, {"beta2": 0.99}),
    (FinetuneConfig, {"device": "cuda"}, {"threads": 4}),
    (SegmentConfig, {"model": "random:mae"}, {"weights": "w"}),
    (SegmentConfig, {"tune": "head"}, {"layer_decay": 0.5}),
    (SegmentConfig, {"tune": "head"}, {"drop_path": 0.1}),
    (SegmentConfig, {"device": "cuda"}, {"threads": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "rest", "unused"), UNUSED)
def test_a_setting_that_changes_nothing_is_refused(
    config: Any, rest: dict[str, Any], unused: dict[str, Any], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    least = LEAST[config] | rest
    config(**least)
    (name,) = unused
    option = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"not used: {option}"):
        config(**least, **unused)
    # in a file and on the command line; there a default that is given counts as given too
    command = {ExtractConfig: "extract", TrainConfig: "train", ProbeConfig: "probe", FinetuneConfig: "finetune",
               SegmentConfig: "segment"}[config]  # fmt: skip
    values = least | unused
    words = [str(values.pop(place)) for place in ("input", "model") if place in values]
    default = config.__dataclass_fields__[name].default
    for value in {str(unused[name]): unused[name], str(default): default}.values():
        given = [] if value is None else value if isinstance(value, tuple) else (value,)
        if given:
            flags = [w for n, v in (values | {name: value}).items() for w in _flag(n, v)]
            code, text = told(capsys, monkeypatch, command, *words, *flags)
            assert (code, f"not used: {option}" in text) == (2, True), text
    file = tmp_path / "s.toml"
    file.write_text("".join(f"{n} = {_toml(v)}\n" for n, v in values.items()))
    code, text = told(capsys, monkeypatch, command, *words, "--config", str(file))
    assert (code, f"not used: {option}" in text) == (2, True), text


def _flag(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    return [option] if value is True else [option, *map(str, value if isinstance(value, tuple) else (value,))]


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(list(value) if isinstance(value, tuple) else value)


def test_all_unused_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(cache="c", out="r", pixels=True, tau=2.0, k="3", stage_bytes="1GB")
    for option in ("--tau", "--k", "--stage-bytes"):
        assert option in str(error.value)


def test_what_is_used_is_not_refused() -> None:
    TrainConfig(cache="c", out="r", online="mae", base_weights="w", tau=2.0, k="3", normalization="patch")
    TrainConfig(cache="c", out="r", init="base", base_weights="w")
    TrainConfig(cache="c", out="r", stage="s", stage_bytes="1GB", threads=2)
    ExtractConfig(cache="c", name="mae", base_weights="w", fit_views=3)
    ExtractConfig(cache="c", input="p", views_only=True, scale=(0.3, 1.0), limit=3, on_error="skip", seed=4)
    ProbeConfig(model="m", train="a", test="b", weights="w")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["plan", "p", "--cache", "c", "--views-only", "--base-batch-size", "8"], "--base-batch-size"),
        (["plan", "p", "--cache", "c", "--views-only", "--epochs", "3", "--student-arg", "depth=2"], "--student-arg"),
        (["plan", "--cache", "c", "--base", "mae", "--images", "100"], "--images"),
        (["verify", "c", "--sample", "64"], "--sample"),
        (["verify", "c", "--seed", "0", "--device", "auto"], "--seed, --device"),
        (["verify", "c", "--base-weights", "w"], "--base-weights"),
    ],
)
def test_other_commands_refuse_what_they_do_not_use(
    words: list[str], option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = told(capsys, monkeypatch, *words)
    assert (code, "not used: " in text, option in text) == (2, True, True), text


@pytest.mark.parametrize(("command", "line"), [("fit", "views_only = true"), ("fit", 'part = "1/2"'),
                                               ("plan", 'part = "1/2"')])  # fmt: skip
def test_a_file_sets_only_what_the_command_has(
    command: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s.toml"
    file.write_text(line)
    code, text = told(capsys, monkeypatch, command, "p", "--cache", "c", "--base", "mae", "--config", str(file))
    assert (code, "has no setting" in text) == (2, True), text


def test_a_plan_counts_the_settings_that_it_was_given(tmp_path: Path) -> None:
    extract = ExtractConfig(input="p", cache="c", views_only=True)
    train = TrainConfig(cache="c", out="r")
    with pytest.raises(ConfigError, match="--train"):
        require_used(PlanConfig(extract=extract, train=train), ["train"])


def test_verify_from_python_refuses_what_it_does_not_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only --base runs the base again"):
        verify(str(tmp_path), sample=64)


@pytest.mark.parametrize(
    ("given", "path"),
    [("~", "{home}"), ("~/a b/{000..001}.tar", "{home}/a b/{{000..001}}.tar"), ("file://~/c", "file://{home}/c"),
     ("./~", "./~"), ("a~", "a~"), ("s3://b/~", "s3://b/~"), ("mae", "mae"), ("", "")],
)  # fmt: skip
def test_home_folders(given: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded(given) == path.format(home=tmp_path)


@pytest.mark.parametrize("path", ["~nobody-of-that-name", "~nobody-of-that-name/c", "a\0b", "~\0"])
def test_what_cannot_be_a_path_is_refused(path: str) -> None:
    with pytest.raises(ConfigError):
        expanded(path)


PLACE_FIELDS = [(c, f.name) for c in LEAST for f in dataclasses.fields(c) if is_place(f)]


@pytest.mark.parametrize(("config", "name"), PLACE_FIELDS, ids=[f"{c.__name__}.{n}" for c, n in PLACE_FIELDS])
def test_every_place_of_a_config_may_begin_with_a_home_folder(
    config: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    base = {"online": "mae"} if config is TrainConfig else {"base": "mae"}
    probed = {"probe_every": 1, "probe_train": "a", "probe_test": "b"}
    of = {"base_weights": base, "classes": {"input": "photos"}, "probe_train": probed, "probe_test": probed}
    needed = of.get(name, {}) if config not in (FinetuneConfig, SegmentConfig) else {}
    made = config(**(LEAST[config] | needed | {name: "~/x"}))
    assert getattr(made, name) in (str(tmp_path / "x"), (str(tmp_path / "x"),))


def test_every_field_that_looks_like_a_place_is_one() -> None:
    """Whoever adds a setting decides: its documentation names a file, a folder or a URL."""
    words = ("folder", "file", "url", "photos (")
    for config in LEAST:
        for field in dataclasses.fields(config):
            if any(word in field.metadata["help"].lower() for word in words):
                assert is_place(field), field.name


ARGUMENTS = [
    (name, parameter.name)
    for name, command in sorted(cli.cli.commands.items())
    for parameter in command.params
    if isinstance(parameter, click.Argument)
]


@pytest.mark.parametrize(("command", "argument"), ARGUMENTS)
def test_no_command_makes_a_folder_named_tilde(
    command: str, argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every argument that names a place, in a folder where a literal ~ would be seen."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    words = ["~/x" if p.name == argument else "y" for p in cli.cli.commands[command].params
             if isinstance(p, click.Argument)]  # fmt: skip
    more = {"extract": ["--cache=~/c", "--base=~/b"], "fit": ["--cache=~/c", "--base=~/b"],
            "plan": ["--cache=~/c", "--base=~/b"], "probe": ["--train=~/t", "--test=~/t"],
            "finetune": ["--train=~/t", "--test=~/t", "--out=~/r"],
            "segment": ["--train=~/t", "--test=~/t", "--out=~/r"]}  # fmt: skip
    code, text = told(capsys, monkeypatch, command, *words, *more.get(command, []))
    assert code in (1, 2, 3), text
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "command", [name for name, _ in ARGUMENTS if name not in ("extract", "fit", "plan", "probe", "finetune", "segment")]
)
def test_an_empty_path_is_not_the_current_folder(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = [p for p in cli.cli.commands[command].params if isinstance(p, click.Argument)]
    code, text = told(capsys, monkeypatch, command, *[""] * len(places))
    assert code == 2, text
    assert not list(tmp_path.iterdir())


def test_the_settings_of_a_run_make_another_one(made_cache: Path, tmp_path: Path) -> None:
    first = tiny_training(made_cache, tmp_path / "one", epochs=2, base_lr=2e-3, mask_ratio=0.5, steps=1)
    train(first)
    read = read_settings(str(tmp_path / "one" / "run.json"), TrainConfig)
    assert {"out", "steps"}.isdisjoint(read)
    again = TrainConfig(**read, out=str(tmp_path / "two"))
    same = {f.name for f in dataclasses.fields(TrainConfig)} - {"out", "steps", "micro_batch"}  # the last: as resolved
    assert {name: getattr(again, name) for name in same} == {name: getattr(first, name) for name in same}
    with pytest.raises(TecCacheError, match="a run of tec-cache train, not of finetune"):
        read_settings(str(tmp_path / "one" / "run.json"), FinetuneConfig)
    with pytest.raises(ConfigError, match=r"reads no run\.json"):
        read_settings(str(tmp_path / "one" / "run.json"), ExtractConfig)
