"""The command line: help, exit codes, settings files, and the installed script wherever it is called."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import cli
from tec_cache.config import ExtractConfig, TrainConfig, read_toml
from tec_cache.errors import ConfigError
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.recipes import BASES
from tec_cache.segment.config import SegmentConfig
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent
SCRIPT = Path(sys.executable).parent / "tec-cache"


def call(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments], capture_output=True, text=True, cwd=cwd, env=os.environ | env, timeout=300
    )


def commands() -> dict[str, click.Command]:
    return cli.cli.commands


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_with_an_example_and_every_option_its_text(name: str) -> None:
    command = commands()[name]
    assert command.help
    assert "Example:" in command.help
    assert f"tec-cache {name}" in command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    assert {"as_json", "quiet", "debug"} <= {p.name for p in command.params}


def test_the_help_lists_every_command_in_the_order_of_work_and_cuts_none_off() -> None:
    assert sorted(name for names in cli.SECTIONS.values() for name in names) == sorted(commands())
    shown = CliRunner().invoke(cli.cli, ["--help"], terminal_width=100).output
    assert "..." not in shown.partition("Options:")[2]
    places = [shown.index(f"\n  {name} ") for names in cli.SECTIONS.values() for name in names]
    assert places == sorted(places)
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize("name", sorted(commands()))
def test_no_line_of_a_help_is_wider_than_its_terminal(name: str) -> None:
    shown = CliRunner().invoke(cli.cli, [name, "--help"], terminal_width=100).output
    assert [line for line in shown.splitlines() if len(line) > 100] == []


def test_the_help_shows_sections_choices_and_what_is_required() -> None:
    shown = CliRunner().invoke(cli.cli, ["train", "--help"], terminal_width=100).output
    titles = ["Targets:", "Base in the loop:", "Student:", "Losses:", "Loader:", "Optimizer and schedule:", "Device:"]
    assert [shown.index(f"\n{title}\n") for title in titles] == sorted(shown.index(f"\n{title}\n") for title in titles)
    assert "--adapters [both|input|encoder|none]" in shown
    assert "--on-error [stop|skip]" in shown
    assert "--schedule [cosine|linear]" in shown
    for option in ("--cache TEXT", "--out TEXT"):
        about = shown[shown.index(option) :].split("\n  --")[0]
        assert "[required]" in about, about


def test_the_help_of_extract_knows_every_base() -> None:
    text = " ".join((commands()["extract"].help or "").split())
    for name in BASES:
        assert name in text or name.removesuffix("_reg") in text, name


def test_the_pages_show_every_command() -> None:
    text = "".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for name in commands():
        assert f"tec-cache {name}" in text


@pytest.mark.parametrize("name", ["extract", "fit", "train"])
def test_no_option_is_taken_by_torchrun_for_its_own(name: str) -> None:
    """`torchrun --no-python tec-cache train --run X` fails: argparse sees an abbreviation of --run-path."""
    from torch.distributed.run import get_args_parser

    theirs = [o for action in get_args_parser()._actions for o in action.option_strings]
    ours = [o for p in commands()[name].params for o in p.opts if o.startswith("--")]
    clashes = {o: t for o in ours for t in theirs if t.startswith(o)}
    assert not clashes


def test_help_is_light() -> None:
    code = (
        "import sys; sys.argv = ['tec-cache', '--help']\n"
        "import cli\ntry:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'timm', 'zarr'} & set(sys.modules), 'heavy import'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "extract" in result.stdout


def test_runs_as_a_script_too() -> None:
    result = subprocess.run([sys.executable, str(ROOT / "cli.py"), "--version"], capture_output=True, text=True)
    assert result.stdout.startswith("tec-cache, version")


def test_installed_script_ignores_a_foreign_cli_and_pipelines(tmp_path: Path, made_cache: Path) -> None:
    (tmp_path / "cli.py").write_text("raise SystemExit('the wrong cli')")
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("raise SystemExit('the wrong pipelines')")
    result = call("info", str(made_cache), "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["num_views"] == 2


@pytest.mark.slow
def test_the_built_wheel_works_in_an_empty_folder(tmp_path: Path, made_cache: Path) -> None:
    """Built, unpacked into an environment of its own that borrows only the dependencies, and run from elsewhere."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "*.egg-info", "build", "dist", "demo-out", "tests")
    )
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # the dependencies of the environment that runs the tests, but not its editable install of this project
    dependencies = next(p for p in sys.path if p.endswith("site-packages"))
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(dependencies + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "cli.py").write_text("raise SystemExit('the wrong cli')")
    script = tmp_path / "venv" / "bin" / "tec-cache"
    result = subprocess.run([str(script), "info", str(made_cache), "--json"], capture_output=True, text=True, cwd=empty)
    assert result.returncode == 0, result.stderr
    where = [str(python), "-c", "import cli, pipelines, tec_cache; print(cli.__file__, pipelines.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert found.count(str(site)) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["extrct"], 2, "did you mean extract"),
        (["extract", "--chache", "x"], 2, "--cache"),
        (["extract", "x", "--cache", "c", "--base", "mea"], 2, "did you mean mae"),
        (["extract", "--cache", "c"], 2, "nothing to do"),
        (["train", "--cache", "nowhere", "--out", "r"], 2, "there is no cache here"),
        (["train", "--cache", "c"], 2, "no out was named"),
        (["train", "--cache", "c", "--out", "r", "--student-arg", "depth"], 2, "NAME=VALUE"),
        (["train", "--cache", "c", "--out", "r", "--adapters", "inputt"], 2, "did you mean input"),
        (["extract", "x", "--cache", "c", "--base", "mae", "--quality", "hihg"], 2, "did you mean high"),
        (["extract", "x", "--cache", "c", "--base", "mae", "--quality", "0.5,0.03"], 2, "give mse from 0.003 to 0.3"),
        (["extract", "x", "--cache", "c", "--base", "mae", "--part", "17/16"], 2, "--part 3/16"),
        (["fit", "x", "--cache", "c", "--base", "mea"], 2, "did you mean mae"),
        (["info", "memory://nowhere"], 2, "there is no cache here"),
        (["info", "nothing://nowhere"], 2, "Protocol not known: nothing"),
        (["info", "nowhere"], 2, "there is nothing here"),
        (["extract", "x", "--cache", "c", "--views", "four"], 2, "not a valid integer"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jpg").write_bytes(b"")
    for json_flag in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["tec-cache", *arguments, *json_flag])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code
        out, err = capsys.readouterr()
        if json_flag:
            assert message in json.loads(out)["error"]["what"] + json.loads(out)["error"]["todo"]
        else:
            assert message in err
            assert "Traceback" not in err
            assert out == ""


def test_a_bare_call_shows_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tec-cache"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    assert lines[0] == "Usage: tec-cache [OPTIONS] COMMAND [ARGS]..."
    assert "Make a cache:" in lines


def test_an_unquoted_pattern_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, student in (("extract", False), ("plan", True)):
        monkeypatch.setattr(sys, "argv", ["tec-cache", command, *(f"{n}.tar" for n in range(40))])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        *_, error, hint = capsys.readouterr().err.splitlines()
        assert error == "Error: unexpected: 1.tar 2.tar 3.tar, and 36 others"
        assert hint.startswith("Hint: quote a pattern such as 'shards/*.tar'")
        assert ("--student-arg" in hint) == student


def test_toml_then_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "s.toml"
    file.write_text('cache = "c"\nviews = 8\nflip = 0.25\nscale = [0.3, 1]\n')
    values = read_toml(file, ExtractConfig)
    assert values == {"cache": "c", "views": 8, "flip": 0.25, "scale": (0.3, 1)}
    seen: list[ExtractConfig] = []
    import pipelines.extract

    def remember(config: ExtractConfig, **_: Any) -> None:
        seen.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr(pipelines.extract, "extract", remember)
    monkeypatch.setattr(sys, "argv", ["tec-cache", "extract", "in", "--config", str(file), "--views", "3"])
    with pytest.raises(SystemExit):
        cli.main()
    assert (seen[0].cache, seen[0].views, seen[0].flip, seen[0].input) == ("c", 3, 0.25, "in")
    file.write_text("viewss = 2\n")
    with pytest.raises(ConfigError, match="did you mean views"):
        read_toml(file, ExtractConfig)
    file.write_text("views = \n")
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(file, ExtractConfig)


def test_train_from_the_command_line(made_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    lines = [f'cache = "{made_cache}"', 'student = "vit_tiny_patch16_224"', "batch_size = 32", "epochs = 2"]
    lines += ["decoder_width = 32", "[student_args]", *(f"{n} = {v}" for n, v in TINY.items())]
    file.write_text("\n".join(lines))
    common = ["train", "--config", str(file), "--out", str(tmp_path / "r"), "--device", "cpu"]
    dry = call(*common, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "r").exists()
    result = call(*common)
    assert result.returncode == 0, result.stderr
    assert "6 of 6" in result.stdout
    assert f"tec-cache export {tmp_path / 'r'}" in result.stdout
    exported = call("export", str(tmp_path / "r"), str(tmp_path / "e"), "--json")
    assert json.loads(exported.stdout) == {"out": str(tmp_path / "e")}


def test_flags_and_config_name_the_same_settings() -> None:
    for name, config in (
        ("extract", ExtractConfig), ("fit", ExtractConfig), ("train", TrainConfig), ("finetune", FinetuneConfig),
        ("segment", SegmentConfig),
    ):  # fmt: skip
        parameters = {p.name for p in commands()[name].params}
        without = {"part", "views_only"} if name == "fit" else set()  # a fit is one and makes no views
        assert {f.name for f in dataclasses.fields(config)} - parameters == without
