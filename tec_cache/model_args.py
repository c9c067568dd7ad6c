"""The arguments of a plain vision transformer that may come from a file or a command line, and no others.

`model_args` of an export and `student_args` of a run go to `timm.create_model`, which takes more than a model's
shape: `checkpoint_path` and `pretrained_cfg` name files that timm would open and, in some versions, unpickle. So a
name that is not in the table below, or a value outside its bounds, never reaches timm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tec_cache.errors import ConfigError, nearest

MOST_WEIGHTS = 10**10
"""Weights of the largest model that is created; DINOv3's largest has 6.7e9."""
MOST_TOKENS = 256 * 256
"""Patches of the largest image."""


@dataclass(frozen=True)
class _Kind:
    """What an argument may be: a test, and the words for it."""

    fits: Callable[[Any], bool]
    words: str


def _whole(low: int, high: int) -> _Kind:
    return _Kind(lambda v: type(v) is int and low <= v <= high, f"a whole number from {low} to {high}")


def _real(low: float, high: float, *, none: bool = False) -> _Kind:
    def fits(value: Any) -> bool:
        number = type(value) in (int, float)
        return (none and value is None) or (number and low <= value <= high)

    return _Kind(fits, f"a number from {low:g} to {high:g}" + (", or null" if none else ""))


def _switch(*, none: bool = False) -> _Kind:
    return _Kind(lambda v: type(v) is bool or (none and v is None), "true or false" + (", or null" if none else ""))


def _word(*words: str) -> _Kind:
    return _Kind(lambda v: type(v) is str and v in words, "one of " + ", ".join(map(repr, words)))


def _edge(low: int, high: int) -> _Kind:
    """Return an edge in pixels, of a square: N, or [N, N] as timm writes it too."""

    def fits(value: Any) -> bool:
        pair = value if isinstance(value, list | tuple) else (value, value)
        return len(pair) == 2 and all(type(v) is int and low <= v <= high for v in pair) and pair[0] == pair[1]

    return _Kind(fits, f"the edge of a square, {low} to {high} pixels")


_CHANCE = _real(0, 1)

MODEL_ARGS: dict[str, _Kind] = {
    "img_size": _edge(1, 4096),
    "patch_size": _edge(1, 256),
    "in_chans": _whole(3, 3),
    "num_classes": _whole(0, 100_000),
    "embed_dim": _whole(1, 8192),
    "depth": _whole(1, 256),
    "num_heads": _whole(1, 256),
    "mlp_ratio": _real(0.0625, 16),
    "qkv_bias": _switch(),
    "qk_norm": _switch(),
    "proj_bias": _switch(),
    "scale_attn_norm": _switch(),
    "scale_mlp_norm": _switch(),
    "init_values": _real(0, 10, none=True),
    "class_token": _switch(),
    "reg_tokens": _whole(0, 1024),
    "pos_embed": _word("learn", "none", ""),
    "no_embed_class": _switch(),
    "pre_norm": _switch(),
    "final_norm": _switch(),
    "fc_norm": _switch(none=True),
    "global_pool": _word("", "token", "avg", "avgmax", "max", "map"),
    "pool_include_prefix": _switch(),
    "dynamic_img_size": _switch(),
    "dynamic_img_pad": _switch(),
    "drop_rate": _CHANCE,
    "pos_drop_rate": _CHANCE,
    "patch_drop_rate": _CHANCE,
    "proj_drop_rate": _CHANCE,
    "attn_drop_rate": _CHANCE,
    "drop_path_rate": _CHANCE,
    "act_layer": _word("gelu", "gelu_tanh", "quick_gelu", "relu", "silu"),
    "norm_layer": _word("layernorm", "rmsnorm"),
}
"""Every argument that is passed on to timm, and what it may be."""

BASE_ARGS = MODEL_ARGS | {
    # of timm's other classes that can be a base: EVA and DINOv3, BEiT, relative positions
    "use_abs_pos_emb": _switch(),
    "use_rot_pos_emb": _switch(),
    "use_rel_pos_bias": _switch(),
    "use_shared_rel_pos_bias": _switch(),
    "use_post_norm": _switch(),
    "use_fc_norm": _switch(none=True),
    "num_reg_tokens": _whole(0, 1024),
    "qkv_fused": _switch(),
    "swiglu_mlp": _switch(),
    "scale_mlp": _switch(),
    "scale_attn_inner": _switch(),
    "rope_type": _word("cat", "dinov3", "mixed"),
    "rope_temperature": _real(1, 1e6),
    "rope_rotate_half": _switch(),
    "rel_pos_type": _word("mlp", "bias"),
    "rel_pos_dim": _whole(1, 8192),
    "shared_rel_pos": _switch(),
    # no argument of timm's: set in its norms once they are made
    "norm_eps": _real(1e-15, 1e-2),
}
"""The same for a base, which may be of more classes than a student."""


def check_model_args(args: Any, where: str, known: Mapping[str, _Kind] = MODEL_ARGS) -> dict[str, Any]:
    """Return a model's arguments, ready for `timm.create_model`, after checking each name and value.

    args: what a file or the command line gave, of any type. where: that file or option, for the message. A square
    that is given as a pair comes back as one number. known: MODEL_ARGS or BASE_ARGS. Raises ConfigError naming the
    argument and what is allowed.
    """
    if not isinstance(args, Mapping):
        raise ConfigError(f"a model's arguments are a {type(args).__name__}, not a table of names", where=where)
    checked: dict[str, Any] = {}
    for name, value in args.items():
        kind = known.get(name) if isinstance(name, str) else None
        if kind is None:
            raise ConfigError(
                f"{name!r} is not an argument of a model that may be given{nearest(str(name), known)}",
                where=where,
                todo=f"leave it out; allowed are {', '.join(known)}",
            )
        if not kind.fits(value):
            raise ConfigError(f"{name} = {_short(value)} is not {kind.words}", where=where, todo=f"change {name}")
        checked[name] = value[0] if isinstance(value, list | tuple) else value
    _check_size(checked, where)
    return checked


def _check_size(args: Mapping[str, Any], where: str) -> None:
    """Refuse a model that no machine holds, before anything is allocated. What is not given counts as little."""
    width, depth = args.get("embed_dim", 64), args.get("depth", 1)
    weights = int(width * width * depth * (4 + 2 * args.get("mlp_ratio", 4)))
    if weights > MOST_WEIGHTS:
        raise ConfigError(
            f"embed_dim = {width} with depth = {depth} makes a model of {weights:,} weights",
            where=where,
            todo=f"ask for at most {MOST_WEIGHTS:,}",
        )
    if "img_size" in args and (args["img_size"] // args.get("patch_size", 16)) ** 2 > MOST_TOKENS:
        raise ConfigError(
            f"img_size = {args['img_size']} in patches of {args.get('patch_size', 16)} makes too many tokens",
            where=where,
            todo=f"ask for at most {MOST_TOKENS:,}",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
