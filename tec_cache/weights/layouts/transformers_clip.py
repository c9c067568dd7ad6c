"""The transformers library's names of CLIP's image encoder."""

from __future__ import annotations

from torch import Tensor

from tec_cache.weights.layouts.clip import as_in_timm
from tec_cache.weights.layouts.layout import Converted, Layout, State, renamed, stack_qkv

_BLOCK = r"encoder\.layers\.(\d+)\."
_RULES = (
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.patch_embedding\.weight", "patch_embed.proj.weight"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"pre_layrnorm\.(.*)", r"norm_pre.\1"),  # the misspelling is theirs
    (r"post_layernorm\.(.*)", r"norm.\1"),
    (rf"{_BLOCK}layer_norm([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (rf"{_BLOCK}self_attn\.([qkv])_proj\.(.*)", r"blocks.\1.attn.\2_proj.\3"),
    (rf"{_BLOCK}self_attn\.out_proj\.(.*)", r"blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}mlp\.(.*)", r"blocks.\1.mlp.\2"),
)


def applies(tensors: State) -> bool:
    """Say whether it has a class embedding."""
    return "embeddings.class_embedding" in tensors


def convert(tensors: dict[str, Tensor]) -> Converted:
    """Return timm's names; query, key and value are stacked."""
    return as_in_timm(stack_qkv(renamed(tensors, _RULES, (r"embeddings\.position_ids$",))))


LAYOUT = Layout(
    "the transformers library's (CLIP)",
    "embeddings.patch_embedding.weight",
    _BLOCK,
    applies,
    convert,
    lambda _: "clip",
)
