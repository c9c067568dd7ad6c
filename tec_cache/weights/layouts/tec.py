"""The released TEC program's student: an encoder under timm's names, with its class token not folded yet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tec_cache.weights.layouts.layout import Converted, Layout, State
from tec_cache.weights.layouts.plain import BLOCK, STEM

ADAPTER = "cls_token_mlp."
_ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


def applies(tensors: State) -> bool:
    """Say whether the input adapter or the encoder adapters are there."""
    return any(name.startswith((ADAPTER, "encoder_adaptor.")) for name in tensors)


def convert(tensors: dict[str, Tensor]) -> Converted:
    """Put T' = fc2(GELU(fc1(T))), exact GELU, in the place of the class token T (1, 1, C); keep the encoder."""
    state = {name: value for name, value in tensors.items() if name.startswith(_ENCODER) and ADAPTER not in name}
    dropped = [name for name in tensors if name not in state and not name.startswith(ADAPTER)]
    if any(name.startswith(ADAPTER) for name in tensors):
        parts = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = (tensors[ADAPTER + part].float() for part in parts)
        token = state["cls_token"]
        hidden = F.gelu(F.linear(token.float(), fc1_weight, fc1_bias))
        state["cls_token"] = F.linear(hidden, fc2_weight, fc2_bias).to(token.dtype)
    return Converted(state, dropped)


LAYOUT = Layout("the released TEC program's", STEM, BLOCK, applies, convert, lambda _: "tec")
