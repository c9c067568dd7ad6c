"""How the world names the parts of a vision transformer: one file per layout, each turning its names into timm's."""

from tec_cache.weights.layouts import clip, dinov2, dinov3, plain, tec, torchvision, transformers_clip
from tec_cache.weights.layouts import transformers_dinov3 as hf_dinov3
from tec_cache.weights.layouts import transformers_vit as hf_vit
from tec_cache.weights.layouts.layout import Converted, Layout

LAYOUTS: tuple[Layout, ...] = (
    tec.LAYOUT,
    dinov3.LAYOUT,
    dinov2.LAYOUT,
    plain.LAYOUT,
    clip.LAYOUT,
    torchvision.LAYOUT,
    hf_vit.LAYOUT,
    hf_dinov3.LAYOUT,
    transformers_clip.LAYOUT,
)
"""In the order in which they are tried: the first whose marks a network has is its layout."""

__all__ = ["LAYOUTS", "Converted", "Layout"]
