"""Which parameters of a segmenter are trained, and at which share of the learning rate and of the weight decay."""

from __future__ import annotations

from tec_cache.finetune.groups import Group, encoder_groups, named_groups, plain_group
from tec_cache.segment.model import Segmenter


def parameter_groups(model: Segmenter, *, weight_decay: float, layer_decay: float) -> list[Group]:
    """Return an optimizer's groups of all parameters that are trained, each in one of them.

    timm's groups of the encoder, lr_scale layer_decay ** (depth + 1 - layer); the head has the scale 1. No decay of
    tensors of one dimension, class token and positions.
    """
    groups = [plain_group(list(model.head.parameters()), weight_decay)]
    if model.tune == "full":
        groups = [*encoder_groups(model.vit, weight_decay, layer_decay), *groups]
    return named_groups(groups, model)
