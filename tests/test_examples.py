"""The examples run from top to bottom, on a few made photos and a tiny random base."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.conftest import encoded, photo, write_tiny_base
from tests.small_exports import random_export

FOLDER = Path(__file__).parent.parent / "examples"


def run(script: str, *words: object) -> dict[str, Any]:
    """Run an example as `python examples/SCRIPT WORDS` does, and return its names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        return runpy.run_path(str(FOLDER / script), run_name="__main__")


def photo_folder(folder: Path, start: int, count: int) -> Path:
    for number in range(start, start + count):
        place = folder / ("cats" if number % 2 else "dogs") / f"p{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(photo(number)))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("examples") / "photos", 0, 24)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("examples") / "held-out", 24, 8)


@pytest.fixture(scope="module")
def first(photos: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache = tmp_path_factory.mktemp("examples") / "CACHE"
    return run("first_cache.py", photos, cache, "--base", tiny_base, "--views", 1, "--size", 32, "--grid", 4)


def test_the_first_cache_is_made_and_looked_at(first: dict[str, Any]) -> None:
    assert (first["summary"].photos, first["summary"].targets_made) == (24, 24)
    assert first["images"].shape == (8, 3, 32, 32)
    assert first["targets"].features.shape == (8, 16, 48)
    assert first["targets"].features.mean(dim=1).abs().max() < 0.2


def test_attention_and_features_of_a_photo_are_drawn(first: dict[str, Any], tmp_path: Path) -> None:
    cache = first["options"].cache
    names = run("draw_attention.py", cache, "--key", "cats/p3.jpg", "--out", tmp_path / "seen")
    assert names["sample"].name.key == "cats/p3.jpg"
    assert len(names["maps"]) == 4  # the class token's and three patches'
    assert all(torch.allclose(maps.sum(dim=(1, 2)), torch.ones(3)) for maps in names["maps"].values())
    assert names["beside"].shape == (32, 64, 3)
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"attention.png", "features.png"}


def test_a_loop_of_ones_own_lowers_its_loss(first: dict[str, Any], tmp_path: Path) -> None:
    words = ["--student", "vit_tiny_patch16_224", "--steps", 12, "--batch-size", 8, "--out", tmp_path / "student.pt"]
    losses = run("own_training_loop.py", first["options"].cache, *words)["losses"]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    model.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))


def test_two_bases_are_trained_on_alone_and_together(
    first: dict[str, Any], photos: Path, held_out: Path, tiny_base: Path, tmp_path: Path
) -> None:
    words = ["--base", tiny_base, "--base", write_tiny_base(tmp_path / "other", seed=1), "--out", tmp_path / "two"]
    words += ["--train", photos, "--test", held_out]
    words += ["--student", "vit_tiny_patch16_224", "--epochs", 1, "--batch-size", 12]
    scores = run("several_bases.py", first["options"].cache, *words)["scores"]
    assert list(scores) == ["tiny", "other", "both"]
    assert all(0 <= score.knn <= 1 and score.test_images == 8 for score in scores.values())
    for name in scores:
        assert timm.create_model(f"local-dir:{tmp_path}/two/{name}-export", pretrained=True).num_features == 192


def test_two_models_are_compared(photos: Path, held_out: Path, tmp_path: Path) -> None:
    models = [f"local-dir:{random_export(tmp_path / 'base')}"]
    models += [f"local-dir:{random_export(tmp_path / 'new', depth=2)}"]
    names = run("compare_models.py", photos, held_out, *models, *models[:1], "--neighbours", 5)
    assert set(names["accuracy"]) == set(models)
    assert all(0 <= share <= 1 for share in names["accuracy"].values())
    assert 0 < sum(names["same"]) / len(names["same"]) <= 1


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_every_example_says_how_it_is_called(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(script, "--help")
    assert "usage:" in capsys.readouterr().out
    assert f"python examples/{script} " in (FOLDER / script).read_text()
