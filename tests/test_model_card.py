"""The card of a model: base and licence, recipe, cache, numbers reached; and what a weight file says by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from pipelines.export import export
from pipelines.finetune import finetune
from pipelines.train import train
from tec_cache.cache.opening import open_cache
from tec_cache.licences import LICENCES, UNKNOWN, licence_of
from tec_cache.model_card import bases_of, model_card, tuned
from tec_cache.recipes import BASES
from tec_cache.run.export import describe
from tec_cache.run.metrics import read_metrics
from tec_cache.run.settings import load_settings, run_identity
from tec_cache.weights.writing import weights_bytes
from tests.conftest import tiny_training, write_shards
from tests.test_finetune import tuning


@pytest.fixture(scope="module")
def trained(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    train(tiny_training(made_cache, folder / "run", steps=3, probe_every=1, probe_train=str(made_cache),
                        probe_test=str(made_cache)))  # fmt: skip
    return folder / "run"


def heading(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def test_the_card_of_a_real_export(trained: Path, made_cache: Path, tmp_path: Path) -> None:
    out = export(trained, tmp_path / "out")
    card = (out / "README.md").read_text()
    about = heading(card)
    assert about["library_name"] == "timm"
    assert about["license"] == "other"
    assert about["pipeline_tag"] == "image-feature-extraction"
    cache = open_cache(made_cache)
    assert f"cache (views): `{cache.fingerprint}`, 2 views" in card
    assert f"targets tiny: `{cache['tiny'].fingerprint}`" in card
    assert f"- tiny: {UNKNOWN.name}" in card
    assert f"run: `{run_identity(load_settings(trained))}`" in card
    assert "- base lr: 0.005" in card
    assert "- step: 3 of " in card
    reached = [line for line in read_metrics(trained) if "probe_knn" in line][-1]
    assert f"nearest neighbours, frozen: {reached['probe_knn']:.2%}" in card
    assert f"linear probe, frozen: {reached['probe_linear']:.2%}" in card
    assert str(tmp_path.parent) not in card, "no places of this machine"


def test_the_weight_files_name_their_run(trained: Path, made_cache: Path, tmp_path: Path) -> None:
    out = export(trained, tmp_path / "out")
    for name in ("model.safetensors", "adapters/adapters.safetensors"):
        with safe_open(out / name, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert json.loads(metadata["tec_cache"]) == {
            "run": run_identity(load_settings(trained)),
            "task": "pretrain",
            "step": 3,
            "bases": ["tiny"],
            "cache": open_cache(made_cache).fingerprint,
        }


def test_a_weight_file_is_the_same_whatever_the_order_of_its_metadata() -> None:
    import torch
    from safetensors.torch import load

    state = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
    one = weights_bytes(state, {"x": "1", "é": "2"})
    assert one == weights_bytes(state, {"é": "2", "x": "1"})
    assert int.from_bytes(one[:8], "little") % 8 == 0
    assert {name: value.tolist() for name, value in load(one).items()} == {"a": [[1, 1], [1, 1]], "b": [0, 1, 2]}


def test_a_tuned_model_names_the_bases_of_its_encoder_and_its_accuracy(trained: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "train", [24])
    write_shards(tmp_path / "test", [13], start=100)
    export(trained, tmp_path / "encoder")
    finetune(tuning(tmp_path, tmp_path / "encoder", tmp_path / "run", epochs=1))
    card = (export(tmp_path / "run", tmp_path / "out") / "README.md").read_text()
    assert heading(card)["pipeline_tag"] == "image-classification"
    assert "- tiny: " in card
    assert "- recipe: small" in card
    top1 = next(line["test_top1"] for line in read_metrics(tmp_path / "run") if "test_top1" in line)
    assert f"top-1: {top1:.2%}" in card
    assert "judged on 13 photos" in card


def test_licences() -> None:
    assert {name: licence_of(name) for name in BASES if licence_of(name) is UNKNOWN} == {}
    assert licence_of("dinov2_small_reg") == LICENCES["dinov2"]
    assert licence_of("mae_large").hub == "cc-by-nc-4.0"
    assert licence_of("my-own") is UNKNOWN
    assert licence_of("vit_small_patch16_dinov3.lvd1689m") == LICENCES["dinov3"]
    assert licence_of("vit_base_patch16_224") is UNKNOWN


def card_of(*targets: dict[str, Any]) -> str:
    description = describe("vit", {}, size=32, width=8, statistics=((0.5,) * 3, (0.5,) * 3))
    return model_card(description, {"settings": {"task": "pretrain", "config": {}, "targets": list(targets)}})


def test_several_bases_and_pixels() -> None:
    mae, dino, own = ({"kind": "cached", "name": n, "fingerprint": "f" * 64} for n in ("mae", "dino", "x|y"))
    assert heading(card_of(mae))["license"] == "cc-by-nc-4.0"
    both = card_of(mae, dino)
    assert heading(both)["license"] == "other"
    assert "- mae: CC BY-NC 4.0" in both
    assert "- dino: Apache 2.0" in both
    assert r"x\|y: not known" in card_of(own)
    pixels = card_of({"kind": "pixels"})
    assert "masked autoencoder" in pixels
    assert "no base, the photos alone" in pixels
    assert bases_of({"settings": {"task": "pretrain", "targets": mae}}) == ["mae"], "as the first exports had it"
    online = {"kind": "online", "base": {"architecture": "vit_base_patch16_224.mae"}, "goal": ""}
    assert bases_of({"settings": {"task": "pretrain", "targets": [online]}}) == ["vit_base_patch16_224.mae"]
    assert bases_of(tuned("/home/someone/private/mae.pth")) == ["mae.pth"]
