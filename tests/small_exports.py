"""Exports of random models, written as `tec-cache export` writes them, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch

from tec_cache.run.export import describe, write_model
from tests.conftest import TINY

NAME = "vit_tiny_patch16_224"


def random_export(folder: Path, *, size: int = 32, num_classes: int = 0, names: list[str] | None = None,
                  adapters: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:  # fmt: skip
    """Write a model in which every weight matters; changes: its arguments beside TINY's."""
    args = TINY | changes
    torch.manual_seed(5)
    model = timm.create_model(NAME, num_classes=num_classes, img_size=size, **args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    description = describe(
        NAME,
        args,
        size=size,
        width=int(args["embed_dim"]),
        statistics=((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
        pool=str(args.get("global_pool", "token")),
        num_classes=num_classes,
        names=names,
    )
    made: dict[str, Any] = {"settings": {"task": "pretrain", "config": {}, "targets": []}, "step": 7, "run": "ab" * 32}
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_model(folder, state, adapters or {}, description, made)
    return folder


def timm_model(folder: Path, **changes: Any) -> Any:
    """The same as timm loads it."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **changes).eval()
