"""A trained segmenter as a folder: its encoder as a model of timm's, and its head beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from tec_cache.finetune.folder import TimmModel
from tec_cache.run.checkpoint import require_tensors

HEAD = "segmentation_head."
"""How the names of a head's weights begin, beside the encoder's adapters."""


def as_timm(
    settings: Mapping[str, Any], state: Mapping[str, Tensor], path: Path
) -> tuple[TimmModel, dict[str, Tensor]]:
    """Turn a checkpoint's segmenter into a model of timm's without a head, and the head's weights, named HEAD + NAME.

    settings: the run's; state: the segmenter's weights; path: for messages. An encoder below UPerNet has no final norm.
    Raises TecCacheError for weights that do not fit or are not finite.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    weights = {name.removeprefix("vit."): value.float() for name, value in plain.items() if name.startswith("vit.")}
    head = {HEAD + name.removeprefix("head."): value for name, value in plain.items() if name.startswith("head.")}
    made = settings["model"]
    more: dict[str, Any] = {} if "norm.weight" in weights else {"final_norm": False}
    dropped = ("norm_eps", "global_pool", "fc_norm", "num_classes")
    kept = {name: value for name, value in made["model_args"].items() if name not in dropped}
    with torch.device("meta"):
        model: Any = timm.create_model(
            made["architecture"].partition(".")[0], num_classes=0, **kept | more | {"img_size": made["input_size"]}
        )
    wanted = {name: (value.shape, torch.float32) for name, value in model.state_dict().items()}
    require_tensors(weights, wanted, path, "the encoder")
    return TimmModel(weights, "token", more, int(model.embed_dim)), head
