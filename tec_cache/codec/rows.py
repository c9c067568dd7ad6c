"""The part that all codecs share: row indices, and logits without their rows' means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tec_cache.codec import ArraySpec
from tec_cache.types import Targets

if TYPE_CHECKING:
    import numpy.typing as npt

    from tec_cache.types import TargetSpec


def rows_array(spec: TargetSpec) -> dict[str, ArraySpec]:
    """Name the array of row indices, where the rows are not simply all patches."""
    if spec.k in (None, 0, "all"):
        return {}
    dtype = "uint8" if spec.num_tokens <= 256 else "uint16"
    return {"rows": ArraySpec((spec.num_rows - 1,), dtype, dimensions=("rank",))}


def encode_rows(targets: Targets, spec: TargetSpec) -> dict[str, npt.NDArray[np.generic]]:
    """Store row indices in the smallest type, unless there are none or they are all patches in order."""
    if targets.rows is None or not rows_array(spec):
        return {}
    return {"rows": targets.rows.cpu().numpy().astype(rows_array(spec)["rows"].dtype)}


def decode_rows(arrays: dict[str, torch.Tensor], spec: TargetSpec, batch: int, device: torch.device) -> torch.Tensor:
    """Give (B, k) int64 row indices back."""
    if "rows" in arrays:
        return arrays["rows"].to(torch.int64)
    count = spec.num_rows - 1
    return torch.arange(count, device=device).expand(batch, count)


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Remove each row's mean over its keys: float32, the same softmax, a smaller range to code."""
    logits = logits.float()
    return logits - logits.mean(dim=-1, keepdim=True)
