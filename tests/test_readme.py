"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipelines.demo import demo
from pipelines.extract import extract
from tests.conftest import tiny_config

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_block_runs(shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), "base.safetensors")
    extract(tiny_config(shards, tmp_path / "CACHE", tiny_base, views=1))
    names: dict[str, Any] = {"images": torch.randn(2, 3, 224, 224), "noise": torch.rand(2, 196)}
    exec(block, names)
    assert set(names["losses"]) == {"feature", "attention"}
    assert names["targets"].features.shape == (2, 16, 48)


def test_the_tree_names_files_that_exist_and_all_of_them() -> None:
    root = Path(__file__).parent.parent
    for folder in ("pipelines", "tec_cache", "benchmarks"):
        for path in root.glob(f"{folder}/**/*.py"):
            if path.name not in ("__init__.py", "machine.py"):
                assert path.name in README or f"{path.parent.name}/" in README, path


def test_the_demo_in_small(tmp_path: Path) -> None:
    said: list[str] = []
    result = demo(tmp_path / "demo", epochs=1, say=said.append)
    assert result["train_images"] + result["test_images"] == 1797
    assert set(result["knn"]) == {"untrained", "round zero (base)", "new model"}
    assert all(0 <= value <= 1 for value in [*result["knn"].values(), *result["linear"].values()])
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert any("images/s cached" in line for line in said)
