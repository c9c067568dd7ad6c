"""int8: a first step of compression, half the size of fp16 with nothing to fit.

Features are scaled per view and channel by their largest magnitude, logits (without their rows' means) per
row. The scales travel with the codes, so each view decodes by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tec_cache.codec import ArraySpec
from tec_cache.codec.rows import centred, decode_rows, encode_rows, rows_array
from tec_cache.errors import NonFiniteError
from tec_cache.types import Targets

if TYPE_CHECKING:
    import numpy.typing as npt

    from tec_cache.types import TargetSpec


class Int8Codec:
    """Arrays: features (L, C) int8 with features_scale (C), attention (H, k+1, L) int8 with attention_scale
    (H, k+1), rows (k) uint16; scales are float32 and value = code * scale.
    """

    name = "int8"

    def arrays(self, spec: TargetSpec) -> dict[str, ArraySpec]:
        """Name the stored arrays."""
        stored = {
            "features": ArraySpec((spec.num_tokens, spec.channels), "int8"),
            "features_scale": ArraySpec((spec.channels,), "float32"),
        }
        if spec.num_rows:
            stored["attention"] = ArraySpec((spec.num_heads, spec.num_rows, spec.num_tokens), "int8")
            stored["attention_scale"] = ArraySpec((spec.num_heads, spec.num_rows), "float32")
        return stored | rows_array(spec)

    def encode(self, targets: Targets, spec: TargetSpec) -> dict[str, npt.NDArray[np.generic]]:
        """Quantize to -127..127; the error is at most half a step of the row or channel."""
        codes, scale = _quantize(targets.features.float(), dim=1)
        stored: dict[str, npt.NDArray[np.generic]] = {"features": codes, "features_scale": scale}
        if targets.attention is not None:
            codes, scale = _quantize(centred(targets.attention), dim=3)
            stored |= {"attention": codes, "attention_scale": scale}
        return stored | encode_rows(targets, spec)

    def decode(self, arrays: dict[str, torch.Tensor], spec: TargetSpec) -> Targets:
        """Multiply codes by their scales."""
        features = arrays["features"].float() * arrays["features_scale"][:, None, :]
        if not spec.num_rows:
            return Targets(features)
        attention = arrays["attention"].float() * arrays["attention_scale"][..., None]
        return Targets(features, attention, decode_rows(arrays, spec, features.shape[0], features.device))

    def to_json(self) -> dict[str, Any]:
        """Return the codec's name; it has no parameters."""
        return {"name": self.name}


def _quantize(values: torch.Tensor, dim: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    largest = values.abs().amax(dim=dim, keepdim=True)
    if not torch.isfinite(largest).all():
        raise NonFiniteError("targets that are not finite cannot be coded")
    # a constant channel has nothing to code: scale 0, codes 0
    codes = (values * torch.where(largest > 0, 127 / largest, 0.0)).round().to(torch.int8)
    return codes.cpu().numpy(), (largest / 127).squeeze(dim).cpu().numpy()
