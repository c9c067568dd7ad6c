"""Export: a folder that timm loads, equal to the training encoder, and the base of the next round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from pipelines.export import export, student_of_run
from pipelines.extract import extract
from pipelines.train import train
from tec_cache.base.load import load_base
from tec_cache.cache.reader import open_cache
from tec_cache.errors import TecCacheError
from tec_cache.run.checkpoint import checkpoints, load_checkpoint, load_settings
from tec_cache.student.adapters import EncoderAdapters
from tec_cache.student.masking import random_mask
from tests.conftest import tiny_config, tiny_training


@pytest.fixture(scope="module")
def runs(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for adapters in ("both", "none"):
        train(tiny_training(made_cache, folder / adapters, steps=3, adapters=adapters))
    return {adapters: folder / adapters for adapters in ("both", "none")}


def trained_student(run: Path) -> Any:
    student = student_of_run(load_settings(run))
    student.load_state_dict(load_checkpoint(checkpoints(run)[-1])["student"])
    return student.eval()


@pytest.mark.parametrize("adapters", ["both", "none"])
def test_timm_loads_the_export_and_gives_the_training_encoders_features(
    runs: dict[str, Path], adapters: str, tmp_path: Path
) -> None:
    out = export(runs[adapters], tmp_path / "out")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    student = trained_student(runs[adapters])
    layers: list[torch.Tensor] = []
    student.encoder.norm.register_forward_hook(lambda *a: layers.append(a[2]))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # with nothing masked, the training encoder sees what timm's model sees, in another order of patches
        noise = torch.arange(16.0).expand(2, -1)
        mask = random_mask(noise, 0.0)
        student.forward_encoder(images, mask)
        theirs = model.forward_features(images)
    torch.testing.assert_close(theirs, layers[0], rtol=0, atol=1e-5)
    folded = (student.class_token() - student.encoder.cls_token).abs().max()
    assert (folded > 1e-3) == (adapters == "both")


def test_adapters_are_exported_beside_it(runs: dict[str, Path], tmp_path: Path) -> None:
    out = export(runs["both"], tmp_path / "out")
    student = trained_student(runs["both"])
    adapters = EncoderAdapters(3, 48, 4 * 32)
    adapters.load_state_dict(load_file(out / "adapters.safetensors"), strict=True)
    layers = [torch.randn(2, 5, 48) for _ in range(3)]
    assert torch.equal(adapters(layers), student.encoder_adapters(layers))
    assert not (export(runs["none"], tmp_path / "none") / "adapters.safetensors").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["tec_cache"]["step"] == 3
    assert config["tec_cache"]["settings"]["config"]["student"] == "vit_tiny_patch16_224"


def test_the_export_is_the_base_of_the_next_round(
    runs: dict[str, Path], shards: Path, made_cache: Path, tmp_path: Path
) -> None:
    out = export(runs["both"], tmp_path / "round-one")
    base = load_base(str(out), grid=4, k=3)
    assert base.mean == pytest.approx((0.485, 0.456, 0.406))
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    _, blocks = model.forward_intermediates(images, indices=2, output_fmt="NLC")
    torch.testing.assert_close(base(images).features, sum(blocks) / 2, rtol=0, atol=1e-5)
    cache = tmp_path / "c"
    extract(tiny_config(shards, cache, out, views=1))
    assert open_cache(cache).target_names == ["round-one"]
    assert train(tiny_training(cache, tmp_path / "r2", steps=2)).steps == 2


def test_an_export_can_be_a_base_at_another_grid(runs: dict[str, Path], tmp_path: Path) -> None:
    out = export(runs["both"], tmp_path / "out")
    base = load_base(str(out), grid=6, k=3)
    assert base(torch.randn(1, 3, 48, 48)).features.shape == (1, 36, 48)


def test_what_cannot_be_exported_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TecCacheError, match="no run here"):
        export(tmp_path, tmp_path / "out")
    export(runs["both"], tmp_path / "out")
    with pytest.raises(TecCacheError, match="already"):
        export(runs["both"], tmp_path / "out")
    export(runs["both"], tmp_path / "out", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(TecCacheError, match="cannot be written"):
        export(runs["both"], tmp_path / "file" / "out")
    whole = checkpoints(runs["both"])[-1].read_bytes()
    broken = tmp_path / "step-000000001.pt"
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TecCacheError, match="damaged checkpoint"):
        export(runs["both"], tmp_path / "out2", checkpoint=broken)
