"""Bases with random weights: what they compute means nothing, how long it takes is that of trained ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file


def write_base(folder: Path, name: str, model_args: dict[str, Any], *, size: int | None = None) -> str:
    """Save a random model in the layout of an export, which `--base FOLDER` takes; return the folder.

    size: edge of its input in pixels; by default the model's own.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    args = model_args | ({} if size is None else {"img_size": size})
    save_file(timm.create_model(name, num_classes=0, **args).state_dict(), folder / "model.safetensors")
    config = {"architecture": name, "model_args": args, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
