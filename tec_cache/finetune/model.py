"""A classifier on a pretrained encoder, by what of it is trained and by whose rules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tec_cache.errors import ConfigError, WeightsError
from tec_cache.finetune.classifier import EPS, Classifier, FrozenClassifier, FullClassifier, LoadedEncoder
from tec_cache.finetune.recipes import Rule, Tune, rule_for
from tec_cache.printable import counted
from tec_cache.recipes import decoder_shape
from tec_cache.rng import key64
from tec_cache.student.adapters import EncoderAdapters, Mlp
from tec_cache.weights.load import load_strict

CLASS_TOKEN = "class_token"
"""Name of T in the state of an input adapter."""
FULL_STD, FROZEN_STD = 2e-5, 0.01
"""Deviation of a new head's weights: of a classifier that is trained as a whole, and of one on a frozen encoder."""


def create_classifier(
    source: LoadedEncoder,
    num_classes: int,
    *,
    tune: Tune = "full",
    rule: Rule | None = None,
    drop_path: float = 0.0,
    adapters_from: str = "pretrained",
    seed: int = 0,
) -> FullClassifier | FrozenClassifier:
    """Create a classifier; every weight of it is loaded, or new and a function of `seed`.

    full, mae: timm's model with global_pool="avg": the pretrained final norm is dropped, a new one (eps 1e-6) follows
        the mean of the patch tokens, all is trained, the class token as it was folded.
    full, tec: the same with T and its MLP trained on in the place of the folded token, position embedding frozen.
    head, mae: MAE's linear probe, on the class token. head, tec: the same on the mean of the patch tokens.
    input-adapter: T and its MLP beside the head of `head, tec`. adapters: these and the encoder adapters, whose Z_e is
        read. adapters_from="random" draws both anew as a student's are, T included: the control, possible for any base.

    rule: None takes `rule_for`. drop_path: highest chance of a block's being skipped, growing with depth.
    Leaves torch's generator as it was. Raises ConfigError for what cannot be meant, WeightsError for adapters that are
    not there or do not fit.
    """
    rule = rule_for(tune, rule)
    with_adapters = (tune == "full" and rule == "tec") or tune in ("input-adapter", "adapters")
    if adapters_from != "pretrained" and tune != "adapters" and not (adapters_from == "random" and with_adapters):
        what = f"{adapters_from} adapters were asked for; {tune} by {rule}'s rule has none"
        raise ConfigError(what, todo="leave out --adapters-from, or give --tune adapters")
    if num_classes < 2:
        raise ConfigError(f"a classifier of {counted(num_classes, 'class')}", todo="give photos of two classes or more")
    if drop_path and tune != "full":
        raise ConfigError(f"drop path {drop_path} of a frozen encoder", todo="leave it out, or tune all of it")
    _check_encoder(source.model, class_token=with_adapters or (tune == "head" and rule == "mae"))
    with torch.random.fork_rng(devices=[]):
        if tune == "full":
            vit = _mean_pooled(source, num_classes, drop_path)
            model: FullClassifier | FrozenClassifier = FullClassifier(source, vit, num_classes, tune, rule)
            vit.pos_embed.requires_grad_(rule == "mae")  # type: ignore[union-attr]
        else:
            model = FrozenClassifier(source, copy.deepcopy(source.model), num_classes, tune, rule)
        head: Any = model.vit.head if tune == "full" else model.head
        std = FULL_STD if tune == "full" else FROZEN_STD
        # MAE's trunc_normal_ cuts at 2, which no draw reaches; timm's and older torch's make one weight in 2**24 -2
        nn.init.normal_(head.weight, std=std, generator=_generator(seed, "head"))
        nn.init.zeros_(head.bias)
        if with_adapters:
            _add_adapters(model, source, adapters_from, seed, encoder=tune == "adapters")
    return model


def _generator(seed: int, part: str) -> torch.Generator:
    """Return a generator for one part's weights, whatever is drawn for the others."""
    return torch.Generator().manual_seed(key64("finetune", part, seed))


def _check_encoder(model: nn.Module, *, class_token: bool) -> None:
    """Refuse, with the reason, what is no plain ViT of timm's with one final norm."""
    if type(model) is not VisionTransformer:
        raise ConfigError(
            f"this model cannot be tuned: {type(model).__name__}", todo="use a plain VisionTransformer of timm"
        )
    reasons = {
        "it pools by attention": model.attn_pool is not None,
        "it has a norm after pooling, whose weights would be lost": not isinstance(model.fc_norm, nn.Identity),
        "it has a head": not isinstance(model.head, nn.Identity),
        "it has no position embedding": model.pos_embed is None,
        "it has no class token": class_token and model.cls_token is None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"this encoder cannot be tuned so: {reason}", todo="use another way of tuning, or model")


def _mean_pooled(source: LoadedEncoder, num_classes: int, drop_path: float) -> VisionTransformer:
    """Create the encoder with mean pooling, a new norm and a head, and fill all but these two."""
    args = {
        name: value
        for name, value in source.model_args.items()
        if name not in ("norm_eps", "global_pool", "fc_norm", "drop_path_rate", "final_norm")
    }
    vit: Any = timm.create_model(
        source.architecture,
        **args | {"img_size": source.input_size},
        num_classes=num_classes,
        global_pool="avg",
        drop_path_rate=drop_path,
    )
    eps = {name: m.eps for name, m in source.model.named_modules() if hasattr(m, "eps")}
    for name, module in vit.named_modules():
        if hasattr(module, "eps"):
            module.eps = eps.get(name, EPS)
    new = {name: value for name, value in vit.state_dict().items() if name.startswith(("fc_norm.", "head."))}
    old = {name: value for name, value in source.model.state_dict().items() if not name.startswith("norm.")}
    if not any(name.startswith("fc_norm.") for name in new) or any(n.startswith("norm.") for n in vit.state_dict()):
        raise ConfigError(
            f"timm {timm.__version__} makes {source.architecture} with its norm before the pooling",
            todo="use another model: that norm was trained for something else",
        )
    load_strict(vit, old | new, what=f"the classifier on {source.architecture}")
    return vit  # type: ignore[no-any-return]


def _add_adapters(model: Classifier, source: LoadedEncoder, adapters_from: str, seed: int, *, encoder: bool) -> None:
    """Put the adapters in, loaded or drawn, and let their weights be trained."""
    vit, width = model.vit, model.vit.embed_dim
    random = adapters_from == "random"
    state = None if random or not encoder else adapters_of(source, adapters_from)
    known = (state or next(iter(source.adapters_states.values()), {})).get("mlps.0.fc1.weight")
    hidden = 4 * decoder_shape(width)[0] if known is None else len(known)
    model.input_adapter = Mlp(width, 4 * width)
    model.encoder_adapters = EncoderAdapters(len(vit.blocks), width, hidden) if encoder else None
    vit.cls_token.requires_grad_(True)
    if random:
        _draw(model, _generator(seed, "adapters"))
        return
    if source.input_adapter_state is None:
        raise _not_there("input adapter")
    token = nn.Module()
    token.register_parameter(CLASS_TOKEN, vit.cls_token)
    tokens = {name: value for name, value in source.input_adapter_state.items() if name == CLASS_TOKEN}
    rest = {name: value for name, value in source.input_adapter_state.items() if name != CLASS_TOKEN}
    load_strict(token, tokens, what="the class token before its MLP")
    load_strict(model.input_adapter, rest, what="the input adapter")
    if model.encoder_adapters is not None:
        if state is None:
            raise _not_there("encoder adapters")
        load_strict(model.encoder_adapters, state, what="the encoder adapters")


def adapters_of(source: LoadedEncoder, adapters_from: str) -> Mapping[str, Tensor] | None:
    """Return the weights of the encoder adapters that were asked for: the only ones, or a target set's; None for none.

    Raises ConfigError where several sets have their own and none is named, or another one than they.
    """
    states = source.adapters_states
    if adapters_from == "pretrained" and len(states) <= 1:
        return next(iter(states.values()), None)
    if adapters_from not in states:
        what = f"there are no encoder adapters of {adapters_from}" if adapters_from != "pretrained" else (
            f"{len(states)} target sets have encoder adapters of their own")  # fmt: skip
        todo = f"give --adapters-from, one of: {', '.join([*(name or 'pretrained' for name in states), 'random'])}"
        raise ConfigError(what, todo=todo)
    return states[adapters_from]


def _draw(model: Classifier, generator: torch.Generator) -> None:
    """Draw T and the adapters as a student's are: normal(0, 0.02), xavier-uniform, zero bias, norms that do nothing."""
    nn.init.normal_(model.vit.cls_token, std=0.02, generator=generator)
    for part in (model.input_adapter, model.encoder_adapters):
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()


def _not_there(what: str) -> WeightsError:
    return WeightsError(
        f"there is no {what} beside this encoder",
        todo="give an export of a run with --adapters both; or draw adapters anew, as a control",
    )
