"""A target set's name stands for its base: what the set remembers of it, and what is said where that is gone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.extract import extract
from pipelines.loading.base_of_set import set_meant
from pipelines.train import train
from pipelines.verify import verify
from tec_cache.cache.opening import open_cache
from tec_cache.config import ExtractConfig
from tec_cache.errors import ConfigError, WeightsError
from tec_cache.run.settings import load_settings
from tests.conftest import TINY, last_checkpoint, tiny_config, tiny_training, write_shards, write_tiny_base

NAME = "timm:vit_tiny_patch16_224"
FROZEN: dict[str, Any] = {"base_lr": 0.0, "weight_decay": 0.0, "steps": 1}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weight file by itself: the architecture is named, and what no shape shows is said."""
    return write_tiny_base(tmp_path / "lab", seed=3) / "model.safetensors"


@pytest.fixture
def cache(tmp_path: Path, weights: Path, tiny_base: Path) -> Path:
    """A cache with the sets "mine", of that file, and "tiny", of a folder."""
    photos = write_shards(tmp_path / "photos", [9])
    base: dict[str, Any] = {"base_weights": str(weights), "base_args": dict(TINY), "mean": (0.1, 0.2, 0.3)}
    extract(tiny_config(photos, tmp_path / "cache", Path(NAME), name="mine", views=1, **base))
    extract(tiny_config(None, tmp_path / "cache", tiny_base))
    return tmp_path / "cache"


def test_a_set_remembers_its_base_and_every_command_finds_it(cache: Path, weights: Path, tmp_path: Path) -> None:
    assert open_cache(cache)["mine"].manifest["notes"]["weights"] == str(weights)
    verdict = verify(str(cache), base="mine", sample=4)
    assert verdict.clean
    assert [(figures["target"], figures["base"]) for figures in verdict.base] == [("mine", NAME)]
    assert verify(str(cache), base=True, sample=4).clean
    train(tiny_training(cache, tmp_path / "online", online=("mine",), batch_size=4, k="3", **FROZEN))
    (learned,) = load_settings(tmp_path / "online")["targets"]
    assert learned["base"] == open_cache(cache)["mine"].identity["base"]
    given = load_file(weights)
    for kind in ({"target": ("mine",)}, {"online": ("mine",), "k": "3"}):
        run = tmp_path / f"init {next(iter(kind))}"
        train(tiny_training(cache, run, init="base", batch_size=4, **kind, **FROZEN))
        state = last_checkpoint(run)["model"]
        assert torch.equal(state["encoder.blocks.0.attn.qkv.weight"], given["blocks.0.attn.qkv.weight"])
    more = ExtractConfig(
        input=str(tmp_path / "photos"), cache=str(cache), name="mine", views=2, device="cpu", threads=1, workers=2
    )
    assert extract(more).targets_made == 9


def test_the_same_command_needs_no_weight_file_while_it_lies_there(cache: Path, weights: Path, tmp_path: Path) -> None:
    again = tiny_config(None, cache, Path(NAME), name="mine", base_args=dict(TINY), mean=(0.1, 0.2, 0.3))
    summary = extract(again)
    assert (summary.targets_made, summary.missing) == (0, 0)
    weights.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(WeightsError):  # the hub is asked, as for a base that nobody gave a file for
        extract(again)


def test_a_file_that_is_gone_is_said_and_may_lie_elsewhere(cache: Path, weights: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(weights, tmp_path / "moved.safetensors"))
    small: dict[str, Any] = {"batch_size": 4, **FROZEN}

    def trained(name: str, file: str | None, **kind: Any) -> Any:
        return train(tiny_training(cache, tmp_path / name, base_weights=file, **kind, **small))

    ways: dict[str, Callable[[str | None], Any]] = {
        "verify": lambda file: verify(str(cache), base="mine", sample=2, base_weights=file),
        "own": lambda file: verify(str(cache), base=True, target="mine", sample=2, base_weights=file),
        "online": lambda file: trained("online", file, online=("mine",), k="3"),
        "init": lambda file: trained("init", file, target=("mine",), init="base"),
    }
    for way in ways.values():
        with pytest.raises(ConfigError, match="weight file is not where it was when the targets 'mine' were made") as e:
            way(None)
        assert e.value.where == str(weights)
        assert "--base-weights FILE" in e.value.todo
        way(str(moved))


def test_other_weights_in_its_place_are_refused(cache: Path, weights: Path, tmp_path: Path) -> None:
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    for kind in ({"online": ("mine",), "k": "3"}, {"target": ("mine",), "init": "base"}):
        with pytest.raises(WeightsError, match="not the weights of the base that made the targets"):
            train(tiny_training(cache, tmp_path / "run", batch_size=4, **kind, **FROZEN))
    assert not verify(str(cache), base="mine", sample=2).clean


def test_a_bases_own_name_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_cache(cache)
    assert set_meant("neither", opened) is None
    assert set_meant("mae", opened) is None
    mine = set_meant("mine", opened)
    assert mine is not None
    assert mine.name == "mine"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "lab", tmp_path / "mine")
    assert set_meant("mine", opened) is None
