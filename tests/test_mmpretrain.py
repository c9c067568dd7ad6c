"""Conversions in the real mmpretrain, which wants an environment of its own (mmcv-lite and an older style of packages).

python3 -m venv /tmp/mmpretrain && /tmp/mmpretrain/bin/pip install mmpretrain 'mmcv-lite==2.1.0' torch torchvision
TEC_CACHE_MMPRETRAIN=/tmp/mmpretrain/bin/python pytest tests/test_mmpretrain.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.convert import convert
from tests.small_exports import random_export, timm_model

PYTHON = os.environ.get("TEC_CACHE_MMPRETRAIN")
SCRIPT = Path(__file__).with_name("mmpretrain_features.py")
KINDS: dict[str, dict[str, Any]] = {
    "encoder": {},
    "encoder without final norm": {"final_norm": False},
    "patches of 4, layer scale": {"patch_size": 4, "size": 24, "init_values": 0.3},
    "no bias of query, key and value": {"qkv_bias": False, "no_embed_class": True},
    "class token": {"num_classes": 3},
    "mean, then a norm": {"num_classes": 3, "global_pool": "avg"},
    "a norm, then the mean": {"num_classes": 3, "global_pool": "avg", "fc_norm": False},
}


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="TEC_CACHE_MMPRETRAIN names no Python that has mmpretrain")
@pytest.mark.parametrize("kind", KINDS)
def test_mmpretrain_gives_what_timm_gives(kind: str, tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e", **KINDS[kind])
    convert(folder, tmp_path / "out", to="mmpretrain")
    model = timm_model(folder)
    images = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    torch.save(images, tmp_path / "images.pt")
    command = [str(PYTHON), str(SCRIPT), str(tmp_path / "out"), str(tmp_path / "images.pt"), str(tmp_path / "answers")]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=clean, timeout=300)
    answers = torch.load(tmp_path / "answers", weights_only=True)
    with torch.no_grad():
        wanted = {"features": model.forward_features(images)}
        if model.num_classes:
            wanted = {"logits": model(images)}
    for name, value in wanted.items():
        torch.testing.assert_close(answers[name], value, rtol=0, atol=2e-5)
