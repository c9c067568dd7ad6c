"""DINOv3's own names: storage tokens, the periods of its rotary embedding, a bias whose key part is masked."""

from __future__ import annotations

import torch
from torch import Tensor

from tec_cache.errors import WeightsError
from tec_cache.weights.layouts.dinov2 import without_chunks
from tec_cache.weights.layouts.layout import Converted, Layout, State, renamed
from tec_cache.weights.layouts.plain import BLOCK, HEADS, STEM

PERIODS = "rope_embed.periods"
BASE_PERIOD = 100.0
"""Of the rotary embedding in every release; timm's classes for DINOv3 compute theirs from it."""

_RULES = (
    (r"storage_tokens", "reg_token"),
    (r"(.*)\.ls1\.gamma", r"\1.gamma_1"),
    (r"(.*)\.ls2\.gamma", r"\1.gamma_2"),
    (r"(.*)\.mlp\.w1\.(.*)", r"\1.mlp.fc1_g.\2"),
    (r"(.*)\.mlp\.w2\.(.*)", r"\1.mlp.fc1_x.\2"),
    (r"(.*)\.mlp\.w3\.(.*)", r"\1.mlp.fc2.\2"),
)
_DROPPED = (*HEADS, r"rope_embed\.", r".*\.bias_mask$", r"local_cls_norm\.")


def applies(tensors: State) -> bool:
    """Say whether a name is there that only DINOv3 has."""
    return "storage_tokens" in tensors or PERIODS in tensors or any(n.endswith("qkv.bias_mask") for n in tensors)


def convert(tensors: dict[str, Tensor]) -> Converted:
    """Return timm's names.

    Of the bias of query, key and value the key's part is masked by the release (and would not change a softmax).
    """
    converted = renamed(without_chunks(tensors), _RULES, _DROPPED)
    state = converted.state
    masks = without_chunks({name: value for name, value in tensors.items() if name.endswith(".bias_mask")})
    for name in [name for name in state if name.endswith(".attn.qkv.bias")]:
        bias, mask = state.pop(name), masks.get(f"{name}_mask")
        bias = bias if mask is None else torch.where(mask == 0, torch.zeros_like(bias), bias)
        query, _, value = bias.chunk(3)
        state[name.replace("qkv.bias", "q_bias")], state[name.replace("qkv.bias", "v_bias")] = query, value
    if PERIODS in tensors:
        converted.num_heads = _heads(tensors[PERIODS], state["patch_embed.proj.weight"].shape[0])
    return converted


def _heads(periods: Tensor, width: int) -> int:
    """Return the number of heads that the periods (D / 4,) of a rotary embedding tell, D the width of a head.

    Raises WeightsError for periods that timm's classes would not compute: they keep none of a file's.
    """
    count = periods.numel()
    expected = BASE_PERIOD ** (torch.arange(count, dtype=torch.float64) / max(1, count))
    if count == 0 or width % (4 * count) or not torch.allclose(periods.double().flatten(), expected, rtol=2e-2, atol=0):
        raise WeightsError(
            f"the periods of its rotary embedding are not those of a base of {BASE_PERIOD:g}",
            todo="timm has no class for it; give a released DINOv3",
        )
    return width // (4 * count)


LAYOUT = Layout("DINOv3's own", STEM, BLOCK, applies, convert, lambda _: "dinov3")
