"""Which parameters of a segmenter are trained, and at which share of the learning rate and of the weight decay."""

from __future__ import annotations

from tec_cache.finetune.groups import Group, encoder_groups, named_groups, plain_group
from tec_cache.segment.model import Segmenter


def parameter_groups(model: Segmenter, *, weight_decay: float, layer_decay: float) -> list[Group]:
    """Return an optimizer's groups of all parameters that are trained, each in one of them.

    lr_scale of a layer is layer_decay ** (depth + 1 - layer), embeddings being layer 0, norm and head the last. Nothing
    of one dimension decays, nor class token and positions. Source: ImageNetSegModel's and mmsegmentation's programs.
    """
    if model.tune == "head":
        return named_groups([plain_group(list(model.head.parameters()), weight_decay)], model)
    above = plain_group([*model.vit.norm.parameters(), *model.head.parameters()], weight_decay)
    norm = {id(p) for p in model.vit.norm.parameters()}
    below = encoder_groups(model.vit, weight_decay, layer_decay)
    for group in below:  # timm counts from the last block, where the encoder has no head of its own
        group["lr_scale"] *= layer_decay
        group["params"] = [p for p in group["params"] if id(p) not in norm]
    return named_groups([*below, above], model)
