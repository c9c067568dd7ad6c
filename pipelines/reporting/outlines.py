"""Models without weights, for counting: from the architecture and arguments that a run or a target set names."""

from __future__ import annotations

from typing import Any

from torch import nn

from tec_cache.base.load import outline
from tec_cache.base.model import FrozenBase
from tec_cache.errors import TecCacheError
from tec_cache.flops import base_macs
from tec_cache.model_args import BASE_ARGS, check_model_args
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.types import Rows


def outlined(made_of: dict[str, Any], grid: int | None) -> nn.Module:
    """Create a model on the "meta" device. made_of: its "architecture" and "model_args". Raises TecCacheError."""
    try:
        name, args = str(made_of["architecture"]).partition(".")[0], dict(made_of["model_args"])
    except (KeyError, TypeError, ValueError) as error:
        raise TecCacheError("it does not say of which architecture it is", todo="look at its settings") from error
    kept = {key: value for key, value in args.items() if key not in ("img_size", "num_classes")}
    return outline(name, check_model_args(kept, name, BASE_ARGS), name, grid)


def outlined_macs(made_of: dict[str, Any], grid: int, k: Rows) -> int:
    """Return the MAC of one image through such a model, with k + 1 rows of attention; k None: with none."""
    model = FrozenBase(outlined(made_of, grid), name="outline", identity={}, mean=IMAGENET_MEAN, std=IMAGENET_STD,
                       last_layers=1, k=k)  # fmt: skip
    return base_macs(model)


def outlined_parameters(made_of: dict[str, Any], grid: int) -> int:
    """Return how many parameters it has."""
    return sum(p.numel() for p in outlined(made_of, grid).parameters())
