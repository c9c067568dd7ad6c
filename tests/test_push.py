"""`tec-cache push` through the real huggingface_hub, to a stand-in of the hub's interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.convert import convert
from pipelines.push import files_of
from tec_cache.errors import TecCacheError
from tests.conftest import files_below
from tests.hub_server import TOKEN, Hub, hub_server
from tests.small_exports import random_export

ROOT = Path(__file__).parent.parent


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as running:
        yield running


def push(hub: Hub, folder: Path, name: str, *more: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    env = {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(folder.parent / "hf"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "cli.py"), "push", str(folder), name, *more]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300)


def test_an_export_lies_on_the_hub_as_it_lies_here_and_can_be_pushed_again(hub: Hub, tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e", adapters={"input_adapter.fc1.weight": torch.zeros(2, 2)})
    (folder / "notes.txt").write_text("not for the hub")
    done = push(hub, folder, "somebody/vit", "--private", "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    here = {name: data for name, data in files_below(folder).items() if name != "notes.txt"}
    assert hub.models["somebody/vit"] == here
    assert "adapters/adapters.safetensors" in here
    assert hub.private == {"somebody/vit": True}
    assert told["files"] == sorted(here) == hub.commits[0]
    assert told["url"] == f"{hub.address}/somebody/vit"
    (folder / "README.md").write_text("a card that its owner has written on\n")
    again = push(hub, folder, "somebody/vit")
    assert again.returncode == 0, again.stderr
    assert "pushed       " in again.stdout
    assert hub.models["somebody/vit"]["README.md"].startswith(b"a card")


def test_a_converted_model_is_pushed_with_its_manifest(hub: Hub, tmp_path: Path) -> None:
    convert(random_export(tmp_path / "e"), tmp_path / "out", to="mmpretrain")
    assert push(hub, tmp_path / "out", "somebody/mm").returncode == 0
    assert hub.models["somebody/mm"] == files_below(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "token", "message", "code"),
    [
        ("somebody/vit", "hf_wrong", "the hub did not take it: ", 1),
        ("other/vit", TOKEN, "the hub did not take it: ", 1),
        ("a/b/c", TOKEN, "the hub allows no such name: a/b/c", 2),
    ],
)
def test_what_the_hub_refuses_is_told(name: str, token: str, message: str, code: int, hub: Hub, tmp_path: Path) -> None:
    done = push(hub, random_export(tmp_path / "e"), name, token=token)
    assert done.returncode == code
    assert message in done.stderr
    assert "to do: " in done.stderr
    assert token not in done.stderr
    assert "Traceback" not in done.stderr
    assert not hub.commits


def test_a_hub_that_does_not_answer_is_told(tmp_path: Path) -> None:
    done = push(Hub(address="http://127.0.0.1:9"), random_export(tmp_path / "e"), "somebody/vit")
    assert done.returncode == 1
    assert "the hub did not take it: " in done.stderr
    assert "bug in tec-cache" not in done.stderr


def test_a_folder_that_was_changed_or_is_something_else_is_not_pushed(tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e")
    assert files_of(folder) == ["README.md", "config.json", "model.safetensors"]
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(TecCacheError, match=r"not as they were written: 1: model\.safetensors"):
        files_of(folder)
    convert(random_export(tmp_path / "f"), tmp_path / "out", to="timm")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(TecCacheError, match=r"missing, or not .*: 1: config\.json"):
        files_of(tmp_path / "out")
    with pytest.raises(TecCacheError, match="neither an export nor a converted model"):
        files_of(tmp_path)
