"""The transformers library's names of ViT, ViTMAE, DeiT, MSN, I-JEPA and DINOv2 with and without registers.

Its version 4 writes `encoder.layer.0.attention.attention.query`, version 5 keeps that in files and calls the same
`layers.0.attention.q_proj` (ViT) or `encoder.layer.0.attention.q_proj` (DINOv2) in memory; both are read.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tec_cache.weights.layouts import dinov2
from tec_cache.weights.layouts.layout import Converted, Layout, State, renamed, stack_qkv

STEM = "embeddings.patch_embeddings.projection.weight"
BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."
_QKV = {"query": "q", "key": "k", "value": "v"}
_RULES = (
    (r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.register_tokens", "register_tokens"),
    (r"embeddings\.mask_token", "mask_token"),
    (r"layernorm\.(.*)", r"norm.\1"),
    (rf"{BLOCK}(?:layernorm_before|norm1)\.(.*)", r"blocks.\1.norm1.\2"),
    (rf"{BLOCK}(?:layernorm_after|norm2)\.(.*)", r"blocks.\1.norm2.\2"),
    (rf"{BLOCK}attention\.([qkv])_proj\.(.*)", r"blocks.\1.attn.\2_proj.\3"),
    (rf"{BLOCK}attention\.attention\.query\.(.*)", r"blocks.\1.attn.q_proj.\2"),
    (rf"{BLOCK}attention\.attention\.key\.(.*)", r"blocks.\1.attn.k_proj.\2"),
    (rf"{BLOCK}attention\.attention\.value\.(.*)", r"blocks.\1.attn.v_proj.\2"),
    (rf"{BLOCK}attention\.(?:output\.dense|o_proj)\.(.*)", r"blocks.\1.attn.proj.\2"),
    (rf"{BLOCK}(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{BLOCK}(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (rf"{BLOCK}mlp\.gate_proj\.(.*)", r"blocks.\1.mlp.gate.\2"),
    (rf"{BLOCK}mlp\.up_proj\.(.*)", r"blocks.\1.mlp.up.\2"),
    (rf"{BLOCK}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
)
_DROPPED = (r"pooler\.", r"classifier\.", r"cls_classifier\.", r"distillation_classifier\.", r"decoder\.")
_GATE = re.compile(r"(.*\.mlp\.)gate\.(.*)")


def applies(tensors: State) -> bool:
    """Say whether the patch embedding is where these models have it, and the blocks are none of BEiT's."""
    return not any(name.endswith((".lambda_1", "relative_position_bias_table")) for name in tensors)


def convert(tensors: dict[str, Tensor]) -> Converted:
    """Return timm's names; query, key and value are stacked, and so are the gate and the rest of a SwiGLU."""
    converted = stack_qkv(renamed(tensors, _RULES, _DROPPED))
    state = converted.state
    for name in [name for name in state if _GATE.fullmatch(name)]:
        match = _GATE.fullmatch(name)
        assert match is not None
        state[f"{match[1]}fc1.{match[2]}"] = torch.cat([state.pop(name), state.pop(f"{match[1]}up.{match[2]}")])
    inner = dinov2.convert(state)  # registers and the mask token are DINOv2's
    return Converted(inner.state, converted.dropped + inner.dropped)


def release(tensors: State) -> str | None:
    """LayerScale is DINOv2's among these."""
    return "dinov2" if any(name.endswith("layer_scale1.lambda1") for name in tensors) else None


LAYOUT = Layout("the transformers library's (ViT, ViTMAE, DINOv2)", STEM, BLOCK, applies, convert, release)
