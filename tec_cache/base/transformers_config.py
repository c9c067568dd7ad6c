"""config.json and preprocessor_config.json of the transformers library, in timm's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tec_cache.base.statistics import three
from tec_cache.errors import WeightsError
from tec_cache.weights.content import read_json
from tec_cache.weights.releases import RELEASES, Colours

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' name -> timm's."""

_LEAST = 1e-15


@dataclass(frozen=True)
class Described:
    """A model of transformers as timm would make it."""

    timm_name: str
    model_args: dict[str, Any]
    statistics: tuple[Colours, Colours] | None
    origin: str
    release: str | None
    pixels: int | None


@dataclass(frozen=True)
class _Type:
    """What a `model_type` is in timm, and what transformers leaves out of a file because it is its default."""

    timm_name: str
    release: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


_VIT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "qkv_bias": True,
    "num_channels": 3,
}
_DINOV2 = {name: value for name, value in _VIT.items() if name != "intermediate_size"} | {
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4,
    "use_swiglu_ffn": False,
}
_DINOV3 = _VIT | {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-5,
    "num_register_tokens": 0,
    "rope_theta": 100.0,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "use_gated_mlp": False,
}
_CLIP = _VIT | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32}

TYPES: dict[str, _Type] = {
    "vit": _Type("vit_base_patch16_224", None, _VIT),
    "vit_mae": _Type("vit_base_patch16_224", "mae", _VIT),
    "vit_msn": _Type("vit_base_patch16_224", None, _VIT | {"layer_norm_eps": 1e-6}),
    "deit": _Type("deit_base_distilled_patch16_224", None, _VIT),
    "ijepa": _Type("vit_base_patch16_224", None, _VIT),
    "dinov2": _Type("vit_base_patch14_dinov2", "dinov2", _DINOV2 | {"patch_size": 14}),
    "dinov2_with_registers": _Type(
        "vit_base_patch14_reg4_dinov2", "dinov2", _DINOV2 | {"patch_size": 16, "num_register_tokens": 4}
    ),
    "dinov3_vit": _Type("vit_base_patch16_dinov3", "dinov3", _DINOV3),
    "clip_vision_model": _Type("vit_base_patch32_clip_224", "clip", _CLIP),
    "clip": _Type("vit_base_patch32_clip_224", "clip", _CLIP),
}
"""The kinds of models of transformers that are read."""


def read(folder: Path, config: dict[str, Any]) -> Described:
    """Say what timm makes the model of a transformers folder with. Raises WeightsError for what it cannot be."""
    where, model_type = str(folder / "config.json"), config["model_type"]
    kind = TYPES.get(model_type) if isinstance(model_type, str) else None
    if kind is None:
        raise WeightsError(
            f"a model of type {str(model_type)[:60]!r} is not read",
            where=where,
            todo=f"give one of type {', '.join(TYPES)}; or name timm's: --base timm:NAME --base-weights FILE",
        )
    if model_type == "clip":
        config = config.get("vision_config") or {}
        if not isinstance(config, dict):
            raise WeightsError("vision_config is not an object", where=where)
    values = _Values({**kind.defaults, **config}, where)
    name, args = _architecture(model_type, kind.timm_name, values)
    statistics, origin = _statistics(folder, kind.release)
    return Described(name, args, statistics, origin, kind.release, values.edge("image_size"))


@dataclass(frozen=True)
class _Values:
    """The fields of a configuration; each is checked when it is asked for."""

    values: Mapping[str, Any]
    where: str

    def whole(self, name: str) -> int:
        value = self.values.get(name)
        if type(value) is not int or not 0 <= value <= 10**6:
            raise WeightsError(f"{name} = {str(value)[:60]} is not a whole number", where=self.where)
        return value

    def edge(self, name: str) -> int:
        value = self.values.get(name)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or not 1 <= value <= 4096:
            raise WeightsError(f"{name} = {str(value)[:60]} is not the edge of a square", where=self.where)
        return value

    def real(self, name: str) -> float:
        value = self.values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e6 < value < 1e6:
            raise WeightsError(f"{name} = {str(value)[:60]} is not a number", where=self.where)
        return float(value)

    def switch(self, name: str) -> bool:
        value = self.values.get(name)
        if type(value) is not bool:
            raise WeightsError(f"{name} = {str(value)[:60]} is neither true nor false", where=self.where)
        return value

    def activation(self) -> str:
        value = self.values.get("hidden_act")
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise WeightsError(
                f"hidden_act = {str(value)[:60]} is not read", where=self.where, todo=f"known: {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]


def _architecture(model_type: str, timm_name: str, values: _Values) -> tuple[str, dict[str, Any]]:
    """Return timm's name and arguments; every argument is given, so that no size of the name's counts."""
    width = values.whole("hidden_size")
    if width < 1 or values.whole("num_channels") != 3:
        raise WeightsError("only models of colour images are read", where=values.where)
    args: dict[str, Any] = {
        "patch_size": values.edge("patch_size"),
        "embed_dim": width,
        "depth": values.whole("num_hidden_layers"),
        "num_heads": values.whole("num_attention_heads"),
        "norm_eps": max(_LEAST, values.real("layer_norm_eps")),
    }
    if model_type == "dinov3_vit":
        return _dinov3(args, values)
    swiglu = model_type.startswith("dinov2") and values.switch("use_swiglu_ffn")
    if model_type.startswith("dinov2"):
        hidden = int(width * values.real("mlp_ratio"))
        if swiglu:
            timm_name = "vit_giant_patch14_reg4_dinov2" if "reg4" in timm_name else "vit_giant_patch14_dinov2"
            hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)  # as transformers rounds it; timm counts both halves
        if "num_register_tokens" in values.values and "reg4" in timm_name:
            args["reg_tokens"] = values.whole("num_register_tokens")
    else:
        hidden = values.whole("intermediate_size")
    args["mlp_ratio"] = _ratio(hidden, width)
    if not swiglu:
        args["act_layer"] = values.activation()
    if not model_type.startswith("clip"):
        args["qkv_bias"] = values.switch("qkv_bias")
    if model_type == "ijepa":
        args |= {"class_token": False, "global_pool": "avg", "fc_norm": False}  # its norm comes before any pooling
    return timm_name, args


def _dinov3(args: dict[str, Any], values: _Values) -> tuple[str, dict[str, Any]]:
    if values.switch("query_bias") != values.switch("value_bias") or values.switch("key_bias"):
        raise WeightsError("biases of query, key and value that timm's class does not have", where=values.where)
    gated = values.switch("use_gated_mlp")
    if values.activation() != ("silu" if gated else "gelu"):
        raise WeightsError("an activation that timm's class does not have", where=values.where)
    args |= {
        "mlp_ratio": _ratio(values.whole("intermediate_size"), args["embed_dim"]),
        "num_reg_tokens": values.whole("num_register_tokens"),
        "rope_temperature": values.real("rope_theta"),
        "qkv_bias": values.switch("query_bias"),
    }
    return "vit_small_plus_patch16_dinov3" if gated else "vit_small_patch16_dinov3", args


def _ratio(hidden: int, width: int) -> float:
    """Return a ratio of which timm's int(width * ratio) makes `hidden` again."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def _statistics(folder: Path, release: str | None) -> tuple[tuple[Colours, Colours] | None, str]:
    """Return mean and deviation of preprocessor_config.json, else the release's, and who says so."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        values, where = read_json(file), str(file)
        factor = values.get("rescale_factor", 1 / 255)
        scaled = (
            values.get("do_rescale", True) is True and type(factor) in (int, float) and abs(factor * 255 - 1) < 1e-3
        )
        if not scaled:
            raise WeightsError(
                "pixels that are not scaled to 0 to 1 before mean and deviation",
                where=where,
                todo="name the model: --base timm:NAME --base-weights FILE --mean R G B --std R G B",
            )
        if values.get("do_normalize", True) is False:
            return ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), file.name
        if "image_mean" in values or "image_std" in values:
            mean = three(values.get("image_mean"), "image_mean", where)
            return (mean, three(values.get("image_std"), "image_std", where, positive=True)), file.name
    if release is not None and RELEASES[release].statistics is not None:
        return RELEASES[release].statistics, f"{RELEASES[release].title}'s"
    return None, ""
