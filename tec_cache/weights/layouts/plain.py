"""timm's own names, which MAE, DINO, iBOT, MoCo v3 and DeiT share."""

from __future__ import annotations

from torch import Tensor

from tec_cache.weights.layouts.layout import Converted, Layout, renamed

STEM = "patch_embed.proj.weight"
BLOCK = r"blocks\.\d+\."
HEADS = (r"head\.", r"head_dist\.", r"decoder_", r"mask_token$", r"masked_embed$")
"""What belongs to pretraining or to a classifier, beside the encoder."""


def convert(tensors: dict[str, Tensor]) -> Converted:
    """Leave out heads, decoders and mask tokens."""
    return renamed(tensors, (), HEADS)


LAYOUT = Layout("timm's", STEM, BLOCK, lambda _: True, convert)
