"""Pictures of what models see: attention over a photo, features as colours, how alike the tokens of a view are.

Pictures are arrays (height, width, 3) uint8; plots are matplotlib's Figure, made without pyplot, so nothing global is
left behind. Only the plots need matplotlib.

    base = tec_cache.load_base("mae", k=0)
    maps = draw.attention_maps(base(images))[0]  # images (B, 3, 224, 224), normalized; maps (H, 14, 14)
    draw.attention_figure(photo, {"mae": maps}).savefig("attention.png")  # photo (224, 224, 3) uint8
"""

from tec_cache.draw.attention import attention_maps, attention_overlay, head_colours, head_overlay
from tec_cache.draw.components import Components, component_colours
from tec_cache.draw.figures import attention_figure, similarity_figure
from tec_cache.draw.similarity import token_similarity

__all__ = [
    "Components",
    "attention_figure",
    "attention_maps",
    "attention_overlay",
    "component_colours",
    "head_colours",
    "head_overlay",
    "similarity_figure",
    "token_similarity",
]
