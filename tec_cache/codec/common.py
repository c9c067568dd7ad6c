"""The part that all codecs share: row indices, class tokens, and logits without their rows' means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tec_cache.codec.codec import ArraySpec
from tec_cache.errors import NonFiniteError
from tec_cache.types import Targets

if TYPE_CHECKING:
    import numpy.typing as npt

    from tec_cache.types import TargetSpec

CLASS_TOKEN = "class_token"
"""Half precision at every quality: one token beside hundreds, of which no view holds a second one to predict it from.
For a ViT-S/14 it takes 0.7 KB of a view."""


def common_arrays(spec: TargetSpec) -> dict[str, ArraySpec]:
    """Name the arrays of row indices, where the rows are not simply all patches, and of class tokens."""
    arrays = {}
    if spec.k not in (None, 0, "all"):
        dtype = "uint8" if spec.num_tokens <= 256 else "uint16"
        arrays["rows"] = ArraySpec((spec.num_rows - 1,), dtype, dimensions=("rank",))
    if spec.class_token:
        arrays[CLASS_TOKEN] = ArraySpec((spec.channels,), "float16", (), "shuffle", dimensions=("channel",))
    return arrays


def encode_common(targets: Targets, spec: TargetSpec) -> dict[str, npt.NDArray[np.generic]]:
    """Store row indices in the smallest type, and class tokens in half precision, as far as the spec has them.

    Raises NonFiniteError for a class token that is not finite in half precision.
    """
    arrays, stored = common_arrays(spec), {}
    if "rows" in arrays and targets.rows is not None:
        stored["rows"] = targets.rows.cpu().numpy().astype(arrays["rows"].dtype)
    if CLASS_TOKEN in arrays and targets.class_token is not None:
        stored[CLASS_TOKEN] = halved(targets.class_token, "class tokens")
    return stored


def decode_common(
    arrays: dict[str, torch.Tensor], spec: TargetSpec, batch: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Give back (B, k) int64 row indices and (B, C) float32 class tokens; None for what the spec does not have."""
    rows = None
    if "rows" in arrays:
        rows = arrays["rows"].to(torch.int64)
    elif spec.num_rows:
        rows = torch.arange(spec.num_rows - 1, device=device).expand(batch, spec.num_rows - 1)
    return rows, arrays[CLASS_TOKEN].float() if spec.class_token else None


def halved(values: torch.Tensor, what: str) -> npt.NDArray[np.float16]:
    """Round to half precision. NonFiniteError for a value beyond 65,504, or not finite."""
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        raise NonFiniteError(
            f"{what} up to {values.abs().max().item():.4g} do not fit into half precision",
            todo="use --quality high, or --normalization patch",
        )
    return half.cpu().numpy()


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Remove each row's mean over its keys: float32, the same softmax, a smaller range to code."""
    logits = logits.float()
    return logits - logits.mean(dim=-1, keepdim=True)
