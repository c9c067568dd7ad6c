"""Views of 448 pixels: what the base sees, its positions as timm interpolates them, and every stage at that size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from pipelines.export import export
from pipelines.extract import extract
from pipelines.probe import probe
from pipelines.terminal.texts import extract_text
from pipelines.train import train
from tec_cache.base.load import load_base
from tec_cache.cache.opening import open_cache
from tec_cache.config import ProbeConfig
from tests.conftest import TINY, tiny_config, tiny_training, write_shards

# patch -> architecture, pixels that it is made for, its other arguments
NATIVE: dict[int, tuple[str, int, dict[str, Any]]] = {
    16: ("vit_tiny_patch16_224", 224, {}),
    14: ("vit_small_patch14_reg4_dinov2", 518, {"init_values": 0.1}),
}


def write_base(folder: Path, patch: int) -> Path:
    """Write a small random model made for its own size of images, as timm's hub lays it out."""
    architecture, edge, more = NATIVE[patch]
    args = TINY | {"patch_size": patch} | more
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, img_size=edge, **args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    cfg = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    config = {"architecture": architecture, "model_args": args | {"img_size": edge}, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("patch", NATIVE)
def test_a_base_at_448_pixels_is_timms_at_448_pixels(patch: int, tmp_path: Path) -> None:
    folder, grid = write_base(tmp_path / "base", patch), 448 // patch
    base = load_base(str(folder), grid=grid, k=3, last_layers=1)
    given = load_file(folder / "model.safetensors")["pos_embed"]
    own = NATIVE[patch][1] // patch
    prefix = given.shape[1] - own**2
    expected = resample_abs_pos_embed(given, [grid, grid], [own, own], num_prefix_tokens=prefix)
    made: Any = base.model
    torch.testing.assert_close(made.pos_embed, expected, rtol=0, atol=1e-6)
    theirs = timm.create_model(
        f"local-dir:{folder}", pretrained=True, img_size=448, pretrained_cfg_overlay={"num_classes": 0}
    ).eval()
    images = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    _, blocks = theirs.forward_intermediates(images, indices=1, norm=False, output_fmt="NLC")
    torch.testing.assert_close(base(images).features, blocks[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("patch", NATIVE)
def test_every_stage_at_448_pixels(patch: int, tmp_path: Path) -> None:
    base, grid, cache = write_base(tmp_path / "base", patch), 448 // patch, tmp_path / "cache"
    photos = write_shards(tmp_path / "photos", [8])
    config = tiny_config(photos, cache, base, views=1, size=448, grid=grid, batch_size=4)
    text = extract_text(extract(config), False, config, True)
    assert f"pixels      448 x 448: {grid} x {grid} patches of {patch}" in text
    assert "seen as they are" not in text
    targets = open_cache(cache)["base"]
    assert (targets.spec.grid, targets.identity["input_size"]) == (grid, 448)
    student = {"student": "vit_tiny_patch16_224", "student_args": TINY | {"patch_size": patch}}
    assert train(tiny_training(cache, tmp_path / "run", batch_size=4, steps=2, **student)).steps == 2
    out = export(tmp_path / "run", tmp_path / "out")
    model: Any = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert model.patch_embed.img_size == (448, 448)
    judged = ProbeConfig(model=str(out), train=str(photos), test=str(photos), neighbours=1, batch_size=4, device="cpu")
    assert probe(judged).knn == 1.0


def test_what_the_base_sees_of_other_crops_is_said(tmp_path: Path, tiny_base: Path) -> None:
    photos = write_shards(tmp_path / "photos", [2])
    for size, said in (
        (448, "448 x 448, reduced to 32 x 32; with --grid 56 seen as they are  (--size)"),
        (36, "36 x 36, reduced to 32 x 32; with --size 32 seen as they are  (--size)"),
        (16, "16 x 16, enlarged to 32 x 32; with --grid 2 seen as they are  (--size)"),
    ):
        config = tiny_config(photos, tmp_path / str(size), tiny_base, views=1, size=size)
        assert said in extract_text(extract(config, dry_run=True), True, config, True)
