"""mmpretrain's VisionTransformer, with its head where the model has one: a configuration and a checkpoint."""

from __future__ import annotations

from typing import Any

from tec_cache.formats.checkpoint_file import checkpoint_bytes
from tec_cache.formats.format import Converted, Format, activation, adapters_left_out, plain, refused, renamed
from tec_cache.formats.model import Model

_NAME = "mmpretrain"
_B, _L = r"blocks\.(\d+)\.", r"backbone.layers.\1."
_RULES = (
    (r"patch_embed\.proj\.(.*)", r"backbone.patch_embed.projection.\1"),
    (r"norm\.(.*)", r"backbone.ln1.\1"),
    (r"fc_norm\.(.*)", r"backbone.ln2.\1"),
    (r"head\.(.*)", r"head.fc.\1"),
    (rf"{_B}norm([12])\.(.*)", rf"{_L}ln\2.\3"),
    (rf"{_B}attn\.(qkv|proj)\.(.*)", rf"{_L}attn.\2.\3"),
    (rf"{_B}mlp\.fc1\.(.*)", rf"{_L}ffn.layers.0.0.\2"),
    (rf"{_B}mlp\.fc2\.(.*)", rf"{_L}ffn.layers.1.\2"),
)
_ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU", "silu": "SiLU"}
_USAGE = """from mmengine.config import Config
from mmpretrain import get_model
model = get_model(Config.fromfile("FOLDER/config.py"), pretrained="FOLDER/model.pth")"""


def convert(model: Model) -> Converted:
    """Rename; the head's pooling decides what the backbone gives."""
    given = plain(model)
    if given.class_token is None or given.registers is not None:
        raise refused(model, _NAME, "has no such VisionTransformer: one class token, no registers")
    state, _ = renamed(given.state, _RULES, {}, model, _NAME)
    state["backbone.cls_token"] = given.class_token.contiguous()
    state["backbone.pos_embed"] = given.positions.contiguous()
    return Converted(
        files={
            "model.pth": checkpoint_bytes({"meta": {}, "state_dict": state}),
            "config.py": _config(model).encode(),
        },
        left_out=adapters_left_out(model),
        changed=tuple(given.changed),
        usage=_USAGE,
    )


def _config(model: Model) -> str:
    """Return the configuration: dictionaries alone, so that mmengine reads it wherever it lies."""
    backbone: dict[str, Any] = {
        "type": "VisionTransformer",
        "arch": {
            "embed_dims": model.width,
            "num_layers": model.depth,
            "num_heads": model.heads,
            "feedforward_channels": model.hidden,
        },
        "img_size": model.size,
        "patch_size": model.patch,
        "qkv_bias": model.qkv_bias,
        "norm_cfg": {"type": "LN", "eps": model.eps},
        "layer_cfgs": {"act_cfg": {"type": activation(model, _NAME, _ACTIVATIONS)}},
        "final_norm": "norm.weight" in model.state,
        "out_type": _out_type(model),
    }
    head = {"type": "LinearClsHead", "num_classes": model.num_classes, "in_channels": model.width}
    classifier: dict[str, Any] = {
        "type": "ImageClassifier",
        "backbone": backbone,
        "neck": {"type": "GlobalAveragePooling"} if backbone["out_type"] == "featmap" else None,
        "head": head if model.num_classes else None,
    }
    pixels = {
        "num_classes": model.num_classes or None,
        "mean": [round(255 * value, 4) for value in model.mean],
        "std": [round(255 * value, 4) for value in model.std],
        "to_rgb": True,
    }
    how = "bicubic" if model.bicubic else "bilinear"
    pipeline = [
        {"type": "LoadImageFromFile"},
        {
            "type": "ResizeEdge",
            "scale": model.shorter_side,
            "edge": "short",
            "backend": "pillow",
            "interpolation": how,
        },
        {"type": "CenterCrop", "crop_size": model.size},
        {"type": "PackInputs"},
    ]
    lines = [
        "# Weights: model.pth beside this file. An encoder gives all its tokens, the class token first: to train a",
        "# classifier on their mean, set out_type='avg_featmap' and final_norm=False, and give a head.",
        f"model = {classifier!r}",
        f"data_preprocessor = {pixels!r}",
        f"test_pipeline = {pipeline!r}",
        f"classes = {model.labels!r}" if model.num_classes else "",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _out_type(model: Model) -> str:
    """Return what the backbone gives to the head."""
    if not model.num_classes:
        return "raw"
    if model.pool == "token":
        return "cls_token"
    if model.pool != "avg":
        raise refused(model, _NAME, f"has no {model.pool} pooling")
    return "avg_featmap" if "fc_norm.weight" in model.state else "featmap"


FORMAT = Format(_NAME, "a configuration and a checkpoint of mmpretrain", convert)
