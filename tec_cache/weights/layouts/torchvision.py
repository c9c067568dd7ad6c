"""torchvision's names of its VisionTransformer."""

from __future__ import annotations

from torch import Tensor

from tec_cache.weights.layouts.layout import Converted, Layout, State, renamed

_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
_RULES = (
    (r"conv_proj\.(.*)", r"patch_embed.proj.\1"),
    (r"class_token", "cls_token"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.ln\.(.*)", r"norm.\1"),
    (rf"{_BLOCK}ln_(\d)\.(.*)", r"blocks.\1.norm\2.\3"),
    (rf"{_BLOCK}self_attention\.in_proj_(.*)", r"blocks.\1.attn.qkv.\2"),
    (rf"{_BLOCK}self_attention\.out_proj\.(.*)", r"blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}mlp\.(?:0|linear_1)\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_BLOCK}mlp\.(?:3|linear_2)\.(.*)", r"blocks.\1.mlp.fc2.\2"),
)


def applies(tensors: State) -> bool:
    """Say whether the position embedding is where torchvision has it."""
    return "encoder.pos_embedding" in tensors


def convert(tensors: dict[str, Tensor]) -> Converted:
    """Return timm's names; the classifier is left out."""
    return renamed(tensors, _RULES, (r"heads\.",))


LAYOUT = Layout("torchvision's", "conv_proj.weight", _BLOCK, applies, convert)
