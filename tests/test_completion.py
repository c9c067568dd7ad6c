"""What a shell completes: names, choices, places; asked as click asks, and as bash, zsh and fish do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

import cli
from tec_cache.finetune.recipes import RECIPES
from tec_cache.formats import FORMATS
from tec_cache.recipes import BASES

ROOT = Path(__file__).parent.parent
SHELLS = ["bash", "zsh", "fish"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of each kind; the targets of `begun` have no manifest yet."""
    files = ["CACHE/cache.json", "CACHE/targets/mae/target.json", "CACHE/targets/ibot/target.json",
             "CACHE/targets/begun/x", "runs/a/run.json", "runs/b/run.json", "photos/a.tar", "photos/b.tar",
             "photos/notes.txt", "export/config.json", "export/model.safetensors", "settings.toml",
             "spaced out.toml", "weights.pth"]  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "settings.toml").write_text('cache = "CACHE"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(line: str) -> list[str]:
    """Return what is offered for the last word of a line; what is left to the shell as <file> or <dir>."""
    *words, typed = line.split(" ")
    found = ShellComplete(cli.cli, {}, "tec-cache", "_TEC_CACHE_COMPLETE").get_completions(words, typed)
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in found]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tr", ["train"]),
        ("extract --jpeg-s", ["--jpeg-subsampling"]),
        ("train --adapters e", ["encoder"]),
        ("train --adapters=e", ["encoder"]),
        ("extract --jpeg-subsampling ", ["444", "422", "420"]),
        ("train --k ", ["none", "all"]),
        ("extract --quality ex", ["exact"]),
        ("train --device c", ["cpu", "cuda"]),
        ("verify --device c", ["cpu", "cuda"]),
        ("convert export out --to ", list(FORMATS)),
        ("finetune mae --recipe ", list(RECIPES)),
        ("extract --base ", list(BASES)),
        ("extract --base ibot_", ["ibot_large"]),
        ("probe mocov", ["mocov3"]),
        ("train --cache CACHE --online i", ["ibot", "ibot_large"]),
        ("verify CACHE --base ib", ["ibot", "ibot_large"]),
        ("train --cache CACHE --target ", ["all", "ibot", "mae"]),
        ("train --cache=CACHE --target=m", ["mae"]),
        ("train --cache CACHE --target mae:0.5 --target ", ["all", "ibot"]),
        ("train --cache CACHE --target mae:0", []),
        ("train --config settings.toml --target m", ["mae"]),
        ("rounds --cache CACHE --target m", ["mae"]),
        ("extract --cache CACHE --name ", ["ibot", "mae"]),
        ("verify CACHE --target m", ["mae"]),
        ("rm CACHE --target i", ["ibot"]),
        ("pack CACHE out --target ", ["ibot", "mae"]),
        # what names no cache, or none that is at hand
        ("train --target m", []),
        ("train --cache nowhere --target ", ["all"]),
        ("train --cache s3://bucket/cache --target m", []),
        ("train --cache ~nobody-of-that-name --target m", []),
        # files and folders: those of the kind, or all of them where the way leads on
        ("extract photos/", ["photos/a.tar", "photos/b.tar"]),
        ("extract ph", ["<file>"]),
        ("train --config se", ["settings.toml"]),
        ("train --config s", ["<file>"]),
        ("export runs/", ["runs/a", "runs/b"]),
        ("export r", ["<dir>"]),
        ("info C", ["CACHE"]),
        ("report runs/a C", ["CACHE"]),
        ("convert e", ["export"]),
        ("train --init r", ["random"]),
        ("train --init runs/", ["runs/a", "runs/b"]),
        ("extract --base ./w", ["./weights.pth"]),
        ("extract --base-weights w", ["weights.pth"]),
        ("extract nowhere/", ["<file>"]),
        ("extract s3://bucket/", ["<file>"]),
        ("train --stage ", ["<dir>"]),
        # in the middle of something that is wrong so far
        ("nothing x", []),
        ("train --views x --cache CACHE --cache CACHE --target m", ["mae"]),
        ("train --student-arg ", []),
    ],
)
def test_what_is_offered(here: Path, line: str, words: list[str]) -> None:
    assert completed(line) == words


def test_a_home_folder_is_looked_into(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert completed("train --cache ~/CACHE --target m") == ["mae"]
    assert completed("rm ~/CACHE --target m") == ["mae"]
    assert completed("export ~/runs/") == ["~/runs/a", "~/runs/b"]


@pytest.mark.parametrize("name", sorted(cli.cli.commands))
def test_no_value_of_any_option_makes_an_error(here: Path, name: str) -> None:
    for parameter in cli.cli.commands[name].params:
        for option in [o for o in parameter.opts if o.startswith("--")]:
            for typed in ("", "x", "/", "~", "a\0b", "://", "[", "'", ":"):
                completed(f"{name} {option} {typed}")


def asked(folder: Path, shell: str, line: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Ask as a shell does, in a process of its own."""
    words = line.split(" ")
    place = words[-1] if shell == "fish" else str(len(words) - 1)
    more = {"_TEC_CACHE_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": place} | env
    command = [sys.executable, str(ROOT / "cli.py")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | more, timeout=60)


@pytest.mark.parametrize("shell", SHELLS)
def test_as_each_shell_asks(here: Path, shell: str) -> None:
    ran = asked(here, shell, "tec-cache train --cache CACHE --target m")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "mae" in ran.stdout
    assert "ibot" not in ran.stdout
    begin = time.monotonic()
    asked(here, shell, "tec-cache extract --base ")
    assert time.monotonic() - begin < 5  # 0.4 s where nobody else works


@pytest.mark.parametrize(
    ("line", "env"),
    [
        ("tec-cache train --cache CACHE --target 'm", {}),
        ("tec-cache nothing --at ", {}),
        ("tec-cache train ", {"COMP_CWORD": "many"}),
        ("tec-cache train ", {"_TEC_CACHE_COMPLETE": "tcsh_complete"}),
        ("tec-cache train ", {"_TEC_CACHE_COMPLETE": "bash"}),
    ],
)
def test_whatever_is_asked_no_error_is_printed(here: Path, line: str, env: dict[str, str]) -> None:
    assert asked(here, "bash", line, **env).stderr == ""


def test_nothing_heavy_is_imported_for_it() -> None:
    code = (
        "import sys, atexit; sys.argv = ['tec-cache']; import cli\n"
        "atexit.register(lambda: print(sorted({'torch', 'numpy', 'timm', 'zarr', 'fsspec'} & set(sys.modules))))\n"
        "cli.main()"
    )
    more = {"_TEC_CACHE_COMPLETE": "bash_complete", "COMP_WORDS": "tec-cache train --base m", "COMP_CWORD": "3"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | more)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_bash_completes_by_the_line_of_the_docs(here: Path) -> None:
    program = here / "bin" / "tec-cache"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "cli.py"}" "$@"\n')
    program.chmod(0o755)
    line = 'eval "$(_TEC_CACHE_COMPLETE=bash_source tec-cache)"'
    assert line in (ROOT / "docs" / "quick-start.md").read_text()
    script = f"{line}\nCOMP_WORDS=(tec-cache rm CACHE --target m); COMP_CWORD=4\n"
    script += 'function=$(complete -p tec-cache | sed "s/.*-F \\([^ ]*\\) .*/\\1/")\n$function tec-cache\n'
    script += 'echo "${COMPREPLY[@]}"'
    path = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=here, env=os.environ | path)
    assert (ran.stdout, ran.stderr) == ("mae\n", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_docs_tell_every_shell(shell: str) -> None:
    assert f"_TEC_CACHE_COMPLETE={shell}_source tec-cache" in (ROOT / "docs" / "quick-start.md").read_text()
