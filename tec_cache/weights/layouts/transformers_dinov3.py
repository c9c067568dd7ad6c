"""The transformers library's names of DINOv3's vision transformers."""

from __future__ import annotations

from torch import Tensor

from tec_cache.weights.layouts.layout import Converted, Layout, State, renamed, stack_qkv

_BLOCK = r"(?:model\.)?layer\.(\d+)\."
_RULES = (
    (r"embeddings\.patch_embeddings\.(.*)", r"patch_embed.proj.\1"),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (rf"{_BLOCK}norm([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (rf"{_BLOCK}attention\.q_proj\.bias", r"blocks.\1.attn.q_bias"),
    (rf"{_BLOCK}attention\.v_proj\.bias", r"blocks.\1.attn.v_bias"),
    (rf"{_BLOCK}attention\.([qkv])_proj\.weight", r"blocks.\1.attn.\2_proj.weight"),
    (rf"{_BLOCK}attention\.o_proj\.(.*)", r"blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}layer_scale([12])\.lambda1", r"blocks.\1.gamma_\2"),
    (rf"{_BLOCK}mlp\.gate_proj\.(.*)", r"blocks.\1.mlp.fc1_g.\2"),
    (rf"{_BLOCK}mlp\.down_proj\.(.*)", r"blocks.\1.mlp.fc2.\2"),
)
_UP = rf"{_BLOCK}mlp\.up_proj\.(.*)"
# a bias of the keys adds one number to all logits of a query, which its softmax takes away again
_DROPPED = (r"embeddings\.mask_token$", r"rope_embeddings\.", rf"{_BLOCK}attention\.k_proj\.bias$")


def applies(tensors: State) -> bool:
    """Say whether it has registers and no position embedding."""
    return "embeddings.register_tokens" in tensors and "embeddings.position_embeddings" not in tensors


def convert(tensors: dict[str, Tensor]) -> Converted:
    """Return timm's names; query, key and value are stacked."""
    gated = any(".mlp.gate_proj." in name for name in tensors)
    up = (_UP, r"blocks.\1.mlp.fc1_x.\2" if gated else r"blocks.\1.mlp.fc1.\2")
    return stack_qkv(renamed(tensors, (*_RULES, up), _DROPPED))


LAYOUT = Layout(
    "the transformers library's (DINOv3)",
    "embeddings.patch_embeddings.weight",
    _BLOCK,
    applies,
    convert,
    lambda _: "dinov3",
)
