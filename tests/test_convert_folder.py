"""What conversions refuse, and how they are written: whole or not at all, and over nothing that is not theirs."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
import tec_cache.store.whole_folder
from pipelines.convert import convert
from tec_cache.errors import ConfigError, TecCacheError, WeightsError
from tec_cache.formats import FORMATS, format_named
from tests.conftest import files_below
from tests.small_exports import random_export, timm_model


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("transformers", {"qk_norm": True}, "has no place for 12: blocks.0.attn.k_norm.bias"),
        ("detectron2", {"qk_norm": True}, "has no place for"),
        ("mmpretrain", {"pre_norm": True}, "has no place for 2: norm_pre.bias"),
        ("mmpretrain", {"reg_tokens": 2}, "no registers"),
        ("transformers", {"class_token": False, "global_pool": "avg", "fc_norm": False}, "without a class token"),
        ("transformers", {"final_norm": False}, "without a final norm"),
        ("transformers", {"global_pool": "avg", "num_classes": 3}, "without a final norm"),
        ("transformers", {"global_pool": "avg", "num_classes": 3, "fc_norm": False}, "no classifier on avg pooling"),
        ("detectron2", {"act_layer": "gelu_tanh"}, "has no activation gelu_tanh, only gelu"),
        ("mmpretrain", {"global_pool": "max", "num_classes": 3, "fc_norm": False}, "has no max pooling"),
    ],
)
def test_what_a_library_cannot_hold_is_refused_by_name(
    to: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = random_export(tmp_path / "e", **changes)
    with pytest.raises(TecCacheError, match=message) as error:
        convert(folder, tmp_path / "out", to=to)
    assert error.value.where == str(folder)
    assert error.value.todo
    assert not (tmp_path / "out").exists()
    assert convert(folder, tmp_path / "t", to="timm").left_out == {}


def test_every_format_bears_the_name_that_it_is_called_by() -> None:
    assert {name: import_module(module).FORMAT.name for name, module in FORMATS.items()} == {n: n for n in FORMATS}
    with pytest.raises(ConfigError, match=r"unknown format 'transformer' \(did you mean transformers"):
        format_named("transformer")


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_export_is_converted_to_the_same_bytes_and_replaced_only_when_asked(to: str, tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e")
    convert(folder, tmp_path / "out", to=to)
    before = files_below(tmp_path / "out")
    with pytest.raises(TecCacheError, match="a converted model here already"):
        convert(folder, tmp_path / "out", to=to)
    convert(folder, tmp_path / "out", to=to, overwrite=True)
    assert files_below(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "out"]


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "tec_cache.json", "model.safetensors"])
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(name: str, tmp_path: Path) -> None:
    folder, out = random_export(tmp_path / "e"), tmp_path / "out"
    for beside in (False, True):
        if beside:
            (out / name).unlink()
            convert(folder, out, to="transformers")
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(b"mine")
        before = files_below(out)
        for overwrite in (False, True):
            with pytest.raises(TecCacheError, match="did not write, or that was changed"):
                convert(folder, out, to="timm", overwrite=overwrite)
        assert files_below(out) == before
    with pytest.raises(TecCacheError, match="did not write"):
        convert(folder, folder, to="timm", overwrite=True)
    assert timm_model(folder).embed_dim == 48


def full_once(call: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """The same call on a disk that is full the first time that `when` says so."""
    left = iter([True])

    def step(*paths: Any) -> Any:
        if when(*paths) and next(left, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*paths)

    return step


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("place", ["sync_file", "sync_folder", "rename"])
def test_an_interrupted_conversion_leaves_the_old_folder_or_none(
    there: bool, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = random_export(tmp_path / "e"), tmp_path / "out"
    if there:
        convert(folder, out, to="timm")
    before = files_below(out)
    where: Any = os if place == "rename" else tec_cache.store.whole_folder
    when = (lambda *paths: Path(paths[1]) == out) if place == "rename" else (lambda *_: True)
    with monkeypatch.context() as patch:
        patch.setattr(where, place, full_once(getattr(where, place), when))
        with pytest.raises(TecCacheError, match="cannot be written: No space left"):
            convert(folder, out, to="transformers", overwrite=True)
    assert files_below(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == (["e", "out"] if there else ["e"])


def test_mistakes_are_told(tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e")
    with pytest.raises(ConfigError, match="60 pixels are no whole number of patches of 8") as error:
        convert(folder, tmp_path / "out", to="timm", size=60)
    assert error.value.todo == "take 64"
    (tmp_path / "empty").mkdir()
    with pytest.raises(TecCacheError, match="this is no export"):
        convert(tmp_path / "empty", tmp_path / "out", to="timm")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-4] + b"\0\0\0\0")
    with pytest.raises(WeightsError, match="written for other weights"):
        convert(folder, tmp_path / "out", to="timm")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["checkpoint_path"] = "x.pth"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match="'checkpoint_path' is not an argument"):
        convert(folder, tmp_path / "out", to="timm")
    del config["pretrained_cfg"]["mean"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TecCacheError, match=r"cannot be understood: .*mean"):
        convert(folder, tmp_path / "out", to="timm")


def test_the_command_says_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = {"encoder_adapters.fuse.weight": torch.zeros(2, 2)}
    folder = random_export(tmp_path / "e", adapters=adapters)
    for flags in ([], ["--json", "--overwrite"]):
        words = ["tec-cache", "convert", str(folder), str(tmp_path / "out"), "--to", "detectron2", *flags]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        out = capsys.readouterr().out
        if flags:
            assert json.loads(out)["left_out"]["cls_token"] == "ViTDet has patch tokens only"
        else:
            assert "left out     norm.*: " in out
            assert "left out     adapters: encoder_adapters: " in out
