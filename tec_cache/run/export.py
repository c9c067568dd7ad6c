"""A trained student as a folder that timm loads: the encoder, with the input adapter folded in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.store.files import write_atomically
from tec_cache.student.model import Student

ADAPTERS_FILE = "adapters.safetensors"


def export_state(student: Student) -> dict[str, torch.Tensor]:
    """Return the encoder's weights under timm's names, CPU float32.

    T' = MLP(T) does not depend on the image, so it simply replaces the class token.
    """
    state = {name: value.detach().cpu().float().contiguous() for name, value in student.encoder.state_dict().items()}
    state["cls_token"] = student.class_token().detach().cpu().float().contiguous()
    return state


def write_export(
    student: Student, out: Path, *, config: dict[str, Any], encoder_name: str, model_args: dict[str, Any]
) -> None:
    """Write model.safetensors, config.json (timm's local-dir layout) and adapters.safetensors.

    config: how the run was made, kept in config.json under "tec_cache" for whoever asks later.
    """
    out.mkdir(parents=True, exist_ok=True)
    encoder: Any = student.encoder
    size = int(encoder.patch_embed.img_size[0])
    write_atomically(out / "model.safetensors", save(export_state(student), metadata={"format": "pt"}))
    (out / ADAPTERS_FILE).unlink(missing_ok=True)
    if student.encoder_adapters is not None:
        adapters = {k: v.detach().cpu().float().contiguous() for k, v in student.encoder_adapters.state_dict().items()}
        write_atomically(out / ADAPTERS_FILE, save(adapters, metadata={"format": "pt"}))
    description = {
        "architecture": encoder_name,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": "token",
        "model_args": model_args | {"img_size": size, "num_classes": 0},
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "unspecified",
        },
        "tec_cache": config,
    }
    write_atomically(out / "config.json", json.dumps(description, indent=2).encode() + b"\n")
