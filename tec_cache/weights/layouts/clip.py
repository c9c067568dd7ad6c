"""CLIP's own names, of OpenAI and OpenCLIP: `visual.transformer.resblocks`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tec_cache.weights.layouts.layout import Converted, Layout, State, renamed

_BLOCK = r"transformer\.resblocks\.(\d+)\."
_RULES = (
    (r"conv1\.weight", "patch_embed.proj.weight"),
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"ln_pre\.(.*)", r"norm_pre.\1"),
    (r"ln_post\.(.*)", r"norm.\1"),
    (rf"{_BLOCK}ln_(\d)\.(.*)", r"blocks.\1.norm\2.\3"),
    (rf"{_BLOCK}attn\.in_proj_(.*)", r"blocks.\1.attn.qkv.\2"),
    (rf"{_BLOCK}attn\.out_proj\.(.*)", r"blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}mlp\.c_fc\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_BLOCK}mlp\.c_proj\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (rf"{_BLOCK}ls_(\d)\.gamma", r"blocks.\1.ls\2.gamma"),
)
_DROPPED = (
    r"proj$",
    r"transformer\.(?!resblocks)",
    r"(text_projection|logit_scale|logit_bias)$",
    r"(token_embedding|ln_final)\.",
)


def applies(tensors: State) -> bool:
    """Say whether it has a class embedding."""
    return "class_embedding" in tensors


def convert(tensors: dict[str, Tensor]) -> Converted:
    """Return timm's names; the projection to the common space is left out."""
    return as_in_timm(renamed(tensors, _RULES, _DROPPED))


def as_in_timm(converted: Converted) -> Converted:
    """Give CLIP's class token (C,) and positions (N, C) timm's shapes, (1, 1, C) and (1, N, C)."""
    state = converted.state
    shaped = {"cls_token": state["cls_token"].reshape(1, 1, -1), "pos_embed": state["pos_embed"][None]}
    return replace(converted, state=state | shaped)


LAYOUT = Layout("CLIP's own", "conv1.weight", _BLOCK, applies, convert, lambda _: "clip")
