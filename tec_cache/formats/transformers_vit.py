"""The transformers library's ViT, and its DINOv2 with registers where the model has some.

Weights bear the names of its version 4, which version 5 reads too.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tec_cache.formats.format import (
    Converted,
    Format,
    Plain,
    activation,
    adapters_left_out,
    in_three,
    plain,
    refused,
    renamed,
)
from tec_cache.formats.model import Model

_NAME = "transformers"
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
_B, _L = r"blocks\.(\d+)\.", r"encoder.layer.\1."
_COMMON = (
    (r"patch_embed\.proj\.(.*)", r"embeddings.patch_embeddings.projection.\1"),
    (r"norm\.(.*)", r"layernorm.\1"),
    (rf"{_B}attn\.((?:query|key|value)\..*)", rf"{_L}attention.attention.\2"),
    (rf"{_B}attn\.proj\.(.*)", rf"{_L}attention.output.dense.\2"),
)
_VIT = (
    *_COMMON,
    (rf"{_B}norm1\.(.*)", rf"{_L}layernorm_before.\2"),
    (rf"{_B}norm2\.(.*)", rf"{_L}layernorm_after.\2"),
    (rf"{_B}mlp\.fc1\.(.*)", rf"{_L}intermediate.dense.\2"),
    (rf"{_B}mlp\.fc2\.(.*)", rf"{_L}output.dense.\2"),
)
_REGISTERS = (
    *_COMMON,
    (rf"{_B}norm([12])\.(.*)", rf"{_L}norm\2.\3"),
    (rf"{_B}mlp\.(.*)", rf"{_L}mlp.\2"),
)


def convert(model: Model) -> Converted:
    """Rename and cut into query, key and value; a classifier on the class token becomes ViTForImageClassification."""
    given = plain(model)
    if given.class_token is None:
        raise refused(model, _NAME, "has no ViT without a class token")
    if "norm.weight" not in given.state:
        raise refused(
            model,
            _NAME,
            "has no ViT without a final norm, as a model has that was tuned on the mean of its tokens or under UPerNet",
            "install timm, and transformers' AutoModelForImageClassification or AutoModel loads the export itself",
        )
    if model.num_classes and (model.pool != "token" or given.registers is not None):
        raise refused(
            model,
            _NAME,
            f"has no classifier on {model.pool} pooling of such a ViT, only on a ViT's class token",
            "install timm, and transformers' AutoModelForImageClassification loads the export itself",
        )
    config = _config(model, given)
    state = _state(model, given)
    head = {name: state.pop(name) for name in list(state) if name.startswith("classifier.")}
    if head:
        state = {f"vit.{name}": value for name, value in state.items()} | head
    name, options = config["architectures"][0], "" if head else ", add_pooling_layer=False"
    options = "" if given.registers is not None else options
    files = {
        "model.safetensors": save(state, metadata={"format": "pt"}),
        "preprocessor_config.json": _json(_preprocessor(model)),
        "config.json": _json(config),
    }
    return Converted(
        files=files,
        left_out=adapters_left_out(model),
        changed=tuple(given.changed),
        usage=f"from transformers import AutoImageProcessor, {name}\n"
        f'model = {name}.from_pretrained("FOLDER"{options})\n'
        'processor = AutoImageProcessor.from_pretrained("FOLDER")',
    )


def _state(model: Model, given: Plain) -> dict[str, Tensor]:
    state = dict(given.state)
    for block in range(model.depth):
        name = f"blocks.{block}.attn"
        parts = in_three(state, f"{name}.qkv")
        state = {n: value for n, value in state.items() if not n.startswith(f"{name}.qkv.")}
        state |= {f"{name}.{part}": value for part, value in parts.items()}
    rules = _VIT if given.registers is None else _REGISTERS
    head = ((r"head\.(.*)", r"classifier.\1"),)
    result, _ = renamed(state, (*rules, *head), {}, model, _NAME)
    assert given.class_token is not None
    result["embeddings.cls_token"] = given.class_token.contiguous()
    result["embeddings.position_embeddings"] = given.positions.contiguous()
    if given.registers is not None:
        result["embeddings.register_tokens"] = given.registers.contiguous()
        result["embeddings.mask_token"] = torch.zeros(1, model.width)
        for block in range(model.depth):
            for which in (1, 2):
                result[f"encoder.layer.{block}.layer_scale{which}.lambda1"] = torch.ones(model.width)
    return result


def _config(model: Model, given: Plain) -> dict[str, Any]:
    config: dict[str, Any] = {
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "hidden_act": activation(model, _NAME, _ACTIVATIONS),
        "layer_norm_eps": model.eps,  # the default of 1e-12 would be another function
        "image_size": model.size,
        "patch_size": model.patch,
        "num_channels": 3,
        "qkv_bias": model.qkv_bias,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }
    if given.registers is not None:
        if model.hidden % model.width:
            raise refused(model, _NAME, f"has no DINOv2 with {model.hidden} channels in its MLPs of {model.width}")
        return config | {
            "architectures": ["Dinov2WithRegistersModel"],
            "model_type": "dinov2_with_registers",
            "mlp_ratio": model.hidden // model.width,
            "num_register_tokens": given.registers.shape[1],
            "layerscale_value": 1.0,
            "use_swiglu_ffn": False,
        }
    kind = "ViTForImageClassification" if model.num_classes else "ViTModel"
    config |= {"architectures": [kind], "model_type": "vit", "intermediate_size": model.hidden}
    if model.num_classes:
        config["id2label"] = {str(number): name for number, name in enumerate(model.labels)}
        config["label2id"] = {name: number for number, name in enumerate(model.labels)}
    return config | {"encoder_stride": model.patch}


def _preprocessor(model: Model) -> dict[str, Any]:
    """Scale the shorter side, cut out the centre, normalize: as timm would judge the model."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": model.shorter_side},
        "resample": 3 if model.bicubic else 2,
        "do_center_crop": True,
        "crop_size": {"height": model.size, "width": model.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": model.mean,
        "image_std": model.std,
    }


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


FORMAT = Format(_NAME, "a folder of the transformers library", convert)
