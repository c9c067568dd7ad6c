"""What the README, docs/ and examples/ show runs, or is at least understood by the command line as it is."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import timm
import yaml
from safetensors.torch import save_file

import cli
import pipelines.demo
from pipelines.demo import GRID, Judged, demo, sentence
from pipelines.extract import extract
from tec_cache.config import ExtractConfig, ProbeConfig, TrainConfig
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.segment.config import SegmentConfig
from tests.conftest import tiny_config

CONFIGS: dict[str, Any] = {
    "extract": ExtractConfig, "fit": ExtractConfig, "train": TrainConfig,
    "finetune": FinetuneConfig, "segment": SegmentConfig, "probe": ProbeConfig,
}  # fmt: skip
ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]}
JOB = yaml.safe_load((ROOT / "examples/kubernetes-extract.yaml").read_text())


def blocks(language: str) -> list[tuple[str, str]]:
    """Return all blocks of a language, each with its page's name."""
    found = {name: re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}
    return [(name, block) for name, every in found.items() for block in every]


BLOCKS = [
    *blocks("sh"),
    *((path.name, path.read_text()) for path in sorted((ROOT / "examples").glob("*.sh"))),
    ("kubernetes-extract.yaml", JOB["spec"]["template"]["spec"]["containers"][0]["args"][0]),
]
PYTHON = [
    (name, block) for name, text in PAGES.items() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
]


def test_the_python_block_runs(shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for name, block in PYTHON if name == "python.md"]
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), "base.safetensors")
    extract(tiny_config(shards, tmp_path / "CACHE", tiny_base, views=1))
    names: dict[str, Any] = {}
    exec(block, names)
    assert set(names["losses"]) == {"feature", "attention"}
    assert all(p.grad is not None for p in names["student"].encoder.blocks.parameters())
    assert names["targets"].features.shape == (2, 16, 48)
    assert (tmp_path / "attention.png").stat().st_size > 1000
    assert names["exact"].features.shape == (2, 196, 384)


def understood(words: list[str]) -> dict[str, Any]:
    """Parse the words after `tec-cache`; a click.UsageError names an option that there is not."""
    command = cli.cli.commands[words[0]]
    context = click.Context(command, info_name=words[0])
    values, rest, _ = command.make_parser(context).parse_args(words[1:])
    assert not rest
    once = {p.name for p in command.params if isinstance(p, click.Option) and not p.multiple and not p.is_flag}
    assert all(len(values[name]) == 1 for name in once & set(values) if isinstance(values[name], list)), words
    return {n: v[0] if n in once and isinstance(v, list) else v for n, v in values.items()}


def command_lines(block: str) -> list[list[str]]:
    """Return the lines of a block that call tec-cache, as words; what the shell would fill in stands as 1/2 or 2."""
    block = re.sub(r"\$\(\(.*?\)\)", "1", block.replace("\\\n", " "))
    lines = [shlex.split(line, comments=True) for line in block.splitlines() if "tec-cache" in line]
    filled = [["1/2" if "/$" in word else re.sub(r"\$\S+", "2", word) for word in line] for line in lines]
    return [line[:-1] if line[-1:] == ["&"] else line for line in filled if "tec-cache" in line]


def test_every_command_line_of_every_page_is_understood() -> None:
    from torch.distributed.run import get_args_parser

    seen = 0
    for page, block in BLOCKS:
        for line in command_lines(block):
            place, seen = line.index("tec-cache"), seen + 1
            name, values = line[place + 1], understood(line[place + 1 :])
            config = CONFIGS.get(name)
            if config is not None:
                command = cli.cli.commands[name]
                given = {p.name: p.type_cast_value(click.Context(command), values[p.name]) for p in command.params
                         if p.name in config.__dataclass_fields__ and values.get(p.name) is not None}  # fmt: skip
                config(**given)
            if "torchrun" in line:
                theirs = get_args_parser().parse_args(line[line.index("torchrun") + 1 :])
                assert (theirs.no_python, theirs.training_script) == (True, "tec-cache"), (page, line)
    assert seen >= 50
    for page, text in PAGES.items():
        for inline in re.findall(r"`tec-cache ([a-z]+ [^`\n]+)`", text):
            assert understood(shlex.split(inline.replace("...", ""))), (page, inline)


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_every_shell_block_is_shell(page: str, block: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
    assert checked.returncode == 0, (page, checked.stderr)


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[name for name, _ in PYTHON])
def test_every_python_block_is_python(page: str, block: str) -> None:
    compile(block, page, "exec")


def test_the_sentence_of_the_demo_follows_from_its_numbers() -> None:
    def said(base: float, new: float, control: float) -> str:
        tuned = {"base": base, "new model": new, "control": control}
        return " ".join(sentence({name: Judged(0.5, 0.5, share) for name, share in tuned.items()}, 400))

    # the standard error of a share of one half over 400 is 2.5 points, of a difference of two 3.5
    assert "not told from its base (+5.0 ± 3.5 points)" in said(0.475, 0.525, 0.525)
    assert "better than its base (+10.0 ± 3.5 points)" in said(0.45, 0.55, 0.55)
    assert "worse than that base with the same computing spent on it (-10.0 ± 3.5" in said(0.45, 0.45, 0.55)


@pytest.mark.slow
def test_the_demo_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("EPOCHS", "TUNE_EPOCHS"):
        monkeypatch.setattr(pipelines.demo, name, 1)
    result = demo(tmp_path / "demo")
    assert result["train_images"] + result["test_images"] == 1797
    assert set(result["judged"]) == {"untrained", "base", "new model", "control"}
    shares = [share for shares in result["judged"].values() for share in shares if share is not None]
    assert len(shares) == 11  # the untrained one is not fine-tuned
    assert all(0 <= share <= 1 for share in shares)
    assert 0 < result["attention_entropy"] < math.log(GRID**2)
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "images/s cached" in capsys.readouterr().out
