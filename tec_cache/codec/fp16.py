"""fp16: normalized features and centred logits as they are, in half precision (relative error 2^-11)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tec_cache.codec.codec import ArraySpec
from tec_cache.codec.common import centred, common_arrays, decode_common, encode_common, halved
from tec_cache.types import Targets

if TYPE_CHECKING:
    import numpy.typing as npt

    from tec_cache.types import TargetSpec

SPLIT = 262_144
"""Bytes that are compressed together: zstd then has Huffman tables for the high bytes alone. With Blosc's own choice
they take 8 % more, with a bit shuffle 6 %, and both take more time (ViT-S/14)."""


class Float16Codec:
    """Arrays: features (L, C) and attention (H, k+1, L) float16, and those of `common`."""

    name = "fp16"

    def arrays(self, spec: TargetSpec) -> dict[str, ArraySpec]:
        """Name the stored arrays."""
        stored = {"features": _halves((spec.num_tokens, spec.channels), ("token", "channel"))}
        if spec.num_rows:
            shape = (spec.num_heads, spec.num_rows, spec.num_tokens)
            stored["attention"] = _halves(shape, ("head", "row", "token"))
        return stored | common_arrays(spec)

    def encode(self, targets: Targets, spec: TargetSpec) -> dict[str, npt.NDArray[np.generic]]:
        """Round to half precision; a value beyond 65,504 is a NonFiniteError."""
        stored: dict[str, npt.NDArray[np.generic]] = {"features": halved(targets.features, "features")}
        if targets.attention is not None:
            stored["attention"] = halved(centred(targets.attention), "attention logits")
        return stored | encode_common(targets, spec)

    def decode(self, arrays: dict[str, torch.Tensor], spec: TargetSpec) -> Targets:
        """Widen to float32."""
        features = arrays["features"].float()
        rows, token = decode_common(arrays, spec, features.shape[0], features.device)
        return Targets(features, arrays["attention"].float() if spec.num_rows else None, rows, token)

    def to_bytes(self) -> None:
        """Return that there is nothing to keep."""


def read(parameters: bytes | None) -> Float16Codec:
    """Make the codec, which has no parameters."""
    return Float16Codec()


def _halves(shape: tuple[int, ...], dimensions: tuple[str, ...]) -> ArraySpec:
    return ArraySpec(shape, "float16", (), "shuffle", SPLIT, dimensions)
