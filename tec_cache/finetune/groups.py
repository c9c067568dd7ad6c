"""Which parameters are trained, and at which share of the learning rate and of the weight decay."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from tec_cache.finetune.model import Classifier

Group = dict[str, Any]
"""params, names, lr_scale (multiplies the learning rate, also in timm's schedules) and weight_decay."""


def parameter_groups(model: Classifier, *, weight_decay: float, layer_decay: float) -> list[Group]:
    """Return an optimizer's groups of all parameters that are trained, each in one of them.

    Full fine-tuning by MAE's rule: timm's groups; lr_scale of a layer is layer_decay ** (depth + 1 - layer), embeddings
    being layer 0 and norm and head the last; no decay of tensors of one dimension, class token and positions.
    By the tec rule the class token and the input adapter's MLP have lr_scale 1 instead. A frozen encoder leaves
    scale 1 for all. Source: MAE's and the released TEC program.
    """
    vit: Any = model.vit
    token = {"params": [vit.cls_token], "weight_decay": 0.0, "lr_scale": 1.0}
    if model.tune != "full":
        others = [p for p in model.parameters() if p.requires_grad and p is not vit.cls_token]
        tokens = [] if model.input_adapter is None else [token]
        return named_groups([*tokens, plain_group(others, weight_decay)], model)
    groups = encoder_groups(vit, weight_decay, layer_decay)
    if model.rule == "tec" and model.input_adapter is not None:
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not vit.cls_token]
        groups += [token, plain_group(list(model.input_adapter.parameters()), weight_decay)]
    return named_groups(groups, model)


def encoder_groups(vit: Any, weight_decay: float, layer_decay: float) -> list[Group]:
    """Return timm's groups of an encoder's trained parameters."""
    groups: list[Group] = param_groups_layer_decay(
        vit, weight_decay, no_weight_decay_list=vit.no_weight_decay(), layer_decay=layer_decay
    )
    return groups


def plain_group(params: list[nn.Parameter], weight_decay: float) -> Group:
    """Return a group of parameters with the whole learning rate."""
    return {"params": params, "weight_decay": weight_decay, "lr_scale": 1.0}


def named_groups(groups: list[Group], model: nn.Module) -> list[Group]:
    """Name the parameters, part those of one dimension from the others where both decay, leave empty groups out."""
    names = {id(p): name for name, p in model.named_parameters()}
    out = []
    for group in groups:
        flat = [p for p in group["params"] if p.ndim <= 1] if group["weight_decay"] else []
        rest = [p for p in group["params"] if not any(p is one for one in flat)]
        for params, decay in ((flat, 0.0), (rest, group["weight_decay"])):
            if params:
                out.append(group | {"params": params, "weight_decay": decay, "names": [names[id(p)] for p in params]})
    return out
