"""A fine-tuned classifier as a model of timm's: what is folded into what, and what timm has no place for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from tec_cache.errors import TecCacheError
from tec_cache.finetune.classifier import EPS
from tec_cache.run.checkpoint import require_tensors
from tec_cache.student.adapters import Mlp


@dataclass(frozen=True)
class TimmModel:
    """Weights under timm's names, CPU float32, and what makes the model that they fit."""

    state: dict[str, Tensor]
    pool: str
    """timm's global_pool."""
    model_args: dict[str, Any]
    """Beside those of the encoder."""
    width: int


def as_timm(settings: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> TimmModel:
    """Turn a checkpoint's classifier into a model of timm's.

    settings: the run's; state: the classifier's weights; path: for messages. The input adapter is folded into the class
    token, the BatchNorm before a head on a frozen encoder into that head. Raises TecCacheError for encoder adapters,
    which timm has no place for, and for weights that do not fit or are not finite.
    """
    tune, rule = settings["config"]["tune"], settings["rule"]
    if tune == "adapters":
        raise TecCacheError(
            "a classifier on encoder adapters is no model of timm's",
            where=str(path),
            todo="its numbers stand in metrics.jsonl; export one that was tuned full, head or input-adapter",
        )
    plain = {name: value.detach().cpu().float() for name, value in state.items()}
    weights = {name.removeprefix("vit."): value for name, value in plain.items() if name.startswith("vit.")}
    mlp = {n.removeprefix("input_adapter."): v for n, v in plain.items() if n.startswith("input_adapter.")}
    if mlp:
        weights["cls_token"] = _folded(weights["cls_token"], mlp)
    pool = "token" if tune != "full" and rule == "mae" else "avg"
    # a frozen encoder's final norm stands before the pooling, as it did when it was trained
    more = {"global_pool": pool} | ({"fc_norm": False} if tune != "full" and pool == "avg" else {})
    if tune != "full":
        scale = (plain["norm.running_var"] + EPS).rsqrt()
        weights["head.weight"] = plain["head.weight"] * scale
        weights["head.bias"] = plain["head.bias"] - weights["head.weight"] @ plain["norm.running_mean"]
    made = settings["model"]
    args = made["model_args"] | more | {"img_size": made["input_size"]}
    with torch.device("meta"):
        model: Any = timm.create_model(
            made["architecture"].partition(".")[0], num_classes=settings["num_classes"], **args
        )
    wanted = {name: (value.shape, torch.float32) for name, value in model.state_dict().items()}
    require_tensors(weights, wanted, path, "the model")
    return TimmModel({n: v.contiguous() for n, v in weights.items()}, pool, more, int(model.embed_dim))


def _folded(token: Tensor, mlp: Mapping[str, Tensor]) -> Tensor:
    """Return T' = MLP(T)."""
    hidden, width = next(v for n, v in mlp.items() if n.endswith("fc1.weight")).shape
    module = Mlp(width, hidden)
    module.load_state_dict(dict(mlp), strict=True)
    with torch.no_grad():
        out: Tensor = module(token)
    return out
