"""An export, read for conversion: its weights under timm's names, and what timm makes of its configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import timm
import torch
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tec_cache.documents import read_as, read_document
from tec_cache.errors import ConfigError, TecCacheError, WeightsError, listed
from tec_cache.kinds import ADAPTERS_FILE, EXPORT_FILE, WEIGHTS_FILE
from tec_cache.model_args import check_model_args
from tec_cache.paths import encodable
from tec_cache.store.files import hash_file
from tec_cache.weights.content import load_content

_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "Swish": "silu",
}
"""Class of a module -> its name among a model's arguments."""


class _Pixels(msgspec.Struct):
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: tuple[int, int, int]


class _Made(msgspec.Struct):
    model_sha256: str
    settings: dict[str, Any]


class _Document(msgspec.Struct):
    """What config.json must have before any of it is used."""

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: _Pixels
    tec_cache: _Made


@dataclass(frozen=True)
class Model:
    """One export."""

    folder: Path
    config: dict[str, Any]
    """The whole of config.json."""
    state: dict[str, Tensor]
    """CPU float32."""
    network: Any
    """timm's VisionTransformer, without memory for weights."""
    size: int
    """Pixels per side."""
    adapters: tuple[str, ...] = ()
    """Names of the weights beside the model's."""

    @property
    def made(self) -> dict[str, Any]:
        """How it was made: run, step, hashes, numbers reached."""
        made: dict[str, Any] = self.config["tec_cache"]
        return made

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self.network.embed_dim)

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.network.blocks)

    @property
    def heads(self) -> int:
        """Heads of attention."""
        return int(self.network.blocks[0].attn.num_heads)

    @property
    def hidden(self) -> int:
        """Channels inside an MLP."""
        return int(self.network.blocks[0].mlp.fc1.out_features)

    @property
    def patch(self) -> int:
        """Pixels per side of a patch."""
        return int(self.network.patch_embed.patch_size[0])

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.size // self.patch

    @property
    def eps(self) -> float:
        """What the norms add to a variance."""
        return float(self.network.blocks[0].norm1.eps)

    @property
    def activation(self) -> str:
        """Of the MLPs, by the names of `model_args`."""
        kind = type(self.network.blocks[0].mlp.act).__name__
        return _ACTIVATIONS.get(kind, kind)

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value have biases."""
        return self.network.blocks[0].attn.qkv.bias is not None

    @property
    def pool(self) -> str:
        """timm's global_pool."""
        return str(self.network.global_pool)

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 for an encoder."""
        return int(self.config.get("num_classes") or 0)

    @property
    def labels(self) -> list[str]:
        """Names of the classes, numbers where none are known; empty for an encoder."""
        names = self.config.get("label_names") or map(str, range(self.num_classes))
        return [str(name) for name in names]

    @property
    def mean(self) -> list[float]:
        """Of the pixels, 0 to 1."""
        return [float(value) for value in self.config["pretrained_cfg"]["mean"]]

    @property
    def std(self) -> list[float]:
        """Deviation of the pixels."""
        return [float(value) for value in self.config["pretrained_cfg"]["std"]]

    @property
    def shorter_side(self) -> int:
        """Pixels that a photo's shorter side is scaled to before the centre is cut out."""
        return int(self.size / float(self.config["pretrained_cfg"].get("crop_pct", 0.875)))

    @property
    def bicubic(self) -> bool:
        """Whether photos are scaled bicubically, not bilinearly."""
        return self.config["pretrained_cfg"].get("interpolation", "bicubic") == "bicubic"


def read_model(folder: Path, size: int | None = None) -> Model:
    """Read an export; size: pixels per side, to which the position embedding is interpolated as timm does it.

    Raises TecCacheError for a folder that is no export, WeightsError for weights that its configuration was not written
    for, ConfigError for a size or a configuration that cannot be.
    """
    file = folder / EXPORT_FILE
    if not file.is_file() or not isinstance(read_document(file).get("tec_cache"), dict):
        raise TecCacheError(
            "this is no export",
            where=str(folder),
            todo="give a folder that tec-cache export made: export the run first",
        )
    read_as(file, _Document)
    config = read_document(file)
    state = _weights(folder / WEIGHTS_FILE, str(config["tec_cache"].get("model_sha256")))
    network, args = _network(config, str(file))
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise WeightsError(
            f"the weights do not fit the model of config.json: {listed(odd, 4)}",
            where=str(folder),
            todo="run tec-cache export again",
        )
    model = Model(folder, config, state, network, int(args["img_size"]), _adapters(folder, config))
    return model if size is None or size == model.size else _resized(model, size)


def _weights(file: Path, expected: str) -> dict[str, Tensor]:
    """Return the weights of an export, once they are those that were written."""
    state = load_content(file)
    if hash_file(file) != expected:
        raise WeightsError(
            "config.json was written for other weights than those beside it",
            where=str(file),
            todo="run tec-cache export again, with --overwrite",
        )
    return {str(name): value.float() for name, value in state.items()}


def _network(config: dict[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """Return timm's model without memory for weights, and its arguments; only a plain vision transformer."""
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ConfigError(f"timm knows no model {architecture!s:.60}", where=where, todo="export the run again")
    args = check_model_args(config.get("model_args") or {}, where)
    whole: dict[str, Any] = {"num_classes": config.get("num_classes") or 0} | args
    with torch.device("meta"):
        network = timm.create_model(architecture, **whole)
    if type(network) is not VisionTransformer or not isinstance(network.blocks[0].norm1, nn.LayerNorm):
        raise ConfigError(
            f"{architecture} is no plain vision transformer with LayerNorm", where=where, todo="load it with timm"
        )
    return network, args | {"img_size": int(network.patch_embed.img_size[0])}  # type: ignore[index]


def _adapters(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the weights in the export's folder of adapters."""
    file = folder / ADAPTERS_FILE
    if config["tec_cache"].get("adapters_sha256") is None or not file.is_file():
        return ()
    with encodable(file) as name, safe_open(name, "pt") as stream:
        return tuple(sorted(stream.keys()))


def _resized(model: Model, size: int) -> Model:
    """Return the model for another size of its images."""
    if size % model.patch or not 0 < size // model.patch <= 256:
        raise ConfigError(
            f"{size} pixels are no whole number of patches of {model.patch}, from 1 to 256",
            where="--size",
            todo=f"take {max(1, round(size / model.patch)) * model.patch}",
        )
    state = dict(model.state)
    if "pos_embed" in state:
        prefix = state["pos_embed"].shape[1] - model.grid**2
        grid = [size // model.patch] * 2
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"], grid, [model.grid] * 2, num_prefix_tokens=prefix
        ).contiguous()
    cfg = model.config["pretrained_cfg"] | {"input_size": [3, size, size]}
    config = model.config | {"model_args": model.config["model_args"] | {"img_size": size}, "pretrained_cfg": cfg}
    return replace(model, config=config, state=state, size=size)
