"""Official weight files -> the encoder's tensors under timm's names -> a model, all of it or nothing.

A release differs from timm's `VisionTransformer` in three ways only: where in the file the network
sits (`teacher`, `model`, `state_dict`, behind `module.` or `base_encoder.`), what lies beside the
encoder (heads, decoders, a second network) and a handful of names. `read_weights` undoes these and
`load_strict` accepts what is left only when every name and shape agrees: a base with one layer left
at random still yields targets that look fine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tec_cache.errors import WeightsError, listed
from tec_cache.paths import encodable

# In the order of preference: an averaged copy (teacher, EMA) is what its authors evaluate and release.
_NETWORKS = ("teacher", "student", "model_ema", "state_dict_ema", "model", "state_dict")
_ROOTS = ("backbone.", "base_encoder.", "momentum_encoder.")
_LEFT_OUT = ("head.", "head_dist.", "decoder_", "mask_token", "masked_embed")
_TEC_ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
# EVA and BEiT have an `fc_norm` that belongs to their encoder; such files come from timm and pass through.
_EVA_MARKS = (".gamma_1", ".attn.q_bias", ".attn.q_proj.", "rope.")
# What only one release has in a name or in the keys around it; the first that fits counts.
_MARKS = {
    "tec": ("cls_token_mlp.", "encoder_adaptor."),
    "mocov3": ("base_encoder.", "momentum_encoder."),
    "mae": ("decoder_",),
    "dinov2": ("register_tokens", "mask_token", "dino_head."),
    "ibot": ("ibot_loss", "masked_embed", "head.mlp2", "head.last_layer2"),
    "dino": ("teacher.", "student.", "head.mlp.", "head.last_layer."),
}
_RELEASES = "give a release of MAE, DINO, iBOT, MoCo v3, DINOv2 or TEC, or a file with timm's names"


@dataclass(frozen=True)
class Weights:
    """The encoder of one weight file, on the CPU, under timm's names and in the file's dtypes.

    `format` is "mae", "dino", "ibot", "mocov3", "dinov2", "tec" or "timm"; a bare encoder carries no
    mark of its origin and counts as "timm". `dropped` are the names left out on purpose: heads, decoders,
    mask tokens, the file's other network, and entries that are not tensors.
    """

    state: dict[str, Tensor]
    format: str
    dropped: tuple[str, ...]
    path: str


def read_weights(path: str | Path) -> Weights:
    """Read `path` (.safetensors, or anything `torch.save` wrote) and keep the encoder.

    Raises `WeightsError` for a file that is missing, damaged or unsafe to unpickle, for one without
    transformer blocks, and for a fine-tuned one whose final norm is gone.
    """
    where = str(path)
    content = _load_content(Path(path))
    network, wrapper, dropped = _choose_network(content)
    kind = _recognise([*map(str, content), *dropped, *(f"{wrapper}.{name}" for name in network)], wrapper)
    tensors: dict[str, Tensor] = {}
    for name, value in _peel(network, where, dropped).items():
        alien = kind == "tec" and not name.startswith((*_TEC_ENCODER, "cls_token_mlp."))
        if alien or name.startswith(_LEFT_OUT) or not isinstance(value, Tensor):
            dropped.append(name)
        else:
            tensors[name] = value.detach()
    if not any(name.startswith("blocks.") for name in tensors):
        raise WeightsError(
            f"no transformer encoder in this file; its top-level keys: {listed(map(str, content))}",
            where=where,
            todo=_RELEASES,
        )
    _settle_final_norm(tensors, dropped, where)
    try:
        tensors = _fold_input_adapter(_rename_dinov2(tensors))
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"an incomplete {kind} file: {error}", where=where, todo=_RELEASES) from error
    return Weights(tensors, kind, tuple(sorted(dropped)), where)


def sha256_of_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and little-endian bytes, whatever the order or the device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        # A JSON line, because names may hold any character; dtype and shape say how many bytes follow it.
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode() + b"\n")
        raw = value.reshape(-1).view(torch.uint8)
        if sys.byteorder == "big":
            raw = raw.reshape(-1, value.element_size()).flip(1).contiguous()
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def _stand_in(module: str, name: str) -> type:
    """Return a class that torch's unpickler takes for `module.name` and that does nothing.

    Checkpoints keep NumPy scalars in their options (a best accuracy, a learning rate). Nothing here
    reads those, so no NumPy code has to run for them, and one list serves NumPy 1 and 2 alike.
    torch 2.5 looks at `__name__`, later versions at `__qualname__`.
    """

    def ignore(self: object, *args: object) -> None:
        pass

    body = {"__module__": module, "__qualname__": name, "__init__": ignore, "__setstate__": ignore}
    return type(name, (), body)


_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    _stand_in("numpy", "dtype"),
    _stand_in("numpy.core.multiarray", "scalar"),
    _stand_in("numpy._core.multiarray", "scalar"),
]


def _load_content(path: Path) -> dict[Any, Any]:
    """Return what the file holds as a dict; only tensors, plain containers and `_SAFE_GLOBALS` are built."""
    where = str(path)
    if path.is_dir():
        raise WeightsError(
            "a folder is not a weight file: which of its files holds the weights would be a guess",
            where=where,
            todo="give the .pth, .pt, .bin or .safetensors file inside it",
        )
    if not path.is_file():
        raise WeightsError("no such weight file", where=where, todo="check the path; nothing is downloaded")
    # Everything is caught: a damaged file can fail anywhere inside the readers, with any exception.
    try:
        if path.suffix == ".safetensors":
            with encodable(path) as name:
                content: Any = load_file(name, device="cpu")
        else:
            with torch.serialization.safe_globals(_SAFE_GLOBALS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise WeightsError(
                f"refused to unpickle {refused[1]}: a weight file may not run code",
                where=where,
                todo="if you trust the file, load it elsewhere and save only its tensors as .safetensors",
            ) from error
        # torch wraps the unpickler's reason in advice to switch its safety off, which is not ours to pass on.
        inner = error.__context__ or error
        reason = " ".join([f"{type(inner).__name__}:", *str(inner).splitlines()[:1]])[:200]
        raise WeightsError(
            f"not a checkpoint that can be read, or a truncated one ({reason})",
            where=where,
            todo="compare size and checksum with the release and fetch it again; or save it as .safetensors",
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"the file holds a {type(content).__name__}, not a dict of tensors", where=where, todo=_RELEASES
        )
    return dict(content)


def _choose_network(content: Mapping[Any, Any]) -> tuple[dict[str, Any], str, list[str]]:
    """Return the preferred network of a file, its key ("" for none) and the names in the other networks."""
    networks: dict[str, dict[str, Any]] = {}
    for key in _NETWORKS:
        entry = content.get(key)
        if isinstance(entry, Mapping) and any(isinstance(value, Tensor) for value in entry.values()):
            networks[key] = {str(name): value for name, value in entry.items()}
    if not networks:
        return {str(name): value for name, value in content.items()}, "", []
    chosen = next(iter(networks))
    others = [f"{key}.{name}" for key in networks if key != chosen for name in networks[key]]
    return networks[chosen], chosen, others


def _peel(network: Mapping[str, Any], where: str, dropped: list[str]) -> dict[str, Any]:
    """Take wrapper prefixes off, in any order; beside a named encoder everything else goes to `dropped`."""

    def bare(name: str) -> str:
        return re.sub(r"^((module|_orig_mod)\.)+", "", name)

    named = [(bare(name), value) for name, value in network.items()]
    root = next((root for root in _ROOTS if any(name.startswith(root) for name, _ in named)), "")
    dropped += [name for name, _ in named if not name.startswith(root)]
    kept = [(bare(name.removeprefix(root)), value) for name, value in named if name.startswith(root)]
    peeled = dict(kept)
    if len(peeled) < len(kept):
        raise WeightsError(
            "some names occur twice, with a prefix such as `module.` and without", where=where, todo=_RELEASES
        )
    return peeled


def _recognise(names: list[str], wrapper: str) -> str:
    """Name the release that wrote these names (all of the file, before anything is taken off)."""
    for kind, marks in _MARKS.items():
        if any(mark in name for name in names for mark in marks):
            return kind
    # MAE's released encoder is a bare {"model": ...}; with a classifier inside it is DeiT's or timm's.
    return "mae" if wrapper == "model" and not any("head." in name for name in names) else "timm"


def _settle_final_norm(tensors: dict[str, Tensor], dropped: list[str], where: str) -> None:
    """Drop an `fc_norm` beside `norm`; refuse one instead of it (it follows the mean of the tokens)."""
    pooled = [name for name in tensors if name.startswith("fc_norm.")]
    if not pooled or any(mark in name for name in tensors for mark in _EVA_MARKS):
        return
    if not any(name.startswith("norm.") for name in tensors):
        raise WeightsError(
            "a fine-tuned file: it has `fc_norm` (of the averaged tokens) and no final `norm` of its encoder",
            where=where,
            todo="give the pretrained file of the same model, not the fine-tuned one",
        )
    for name in pooled:
        dropped.append(name)
        del tensors[name]


def _rename_dinov2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's names and token layout in timm's terms; any other state comes back as it is."""
    if "register_tokens" in tensors:
        # timm's register models add positions to patches only, so the class position joins the class token.
        position = tensors["pos_embed"]
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + position[:, :1]
        tensors["pos_embed"] = position[:, 1:].clone()
    if not any(".mlp.w12." in name for name in tensors):
        return tensors  # a `w3` without `w12` is an unpacked SwiGLU (DINOv3), whose names timm shares
    renamed = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
    return {re.sub(r"\.mlp\.(w12|w3)\.", lambda m: renamed[m[0]], name): t for name, t in tensors.items()}


def _fold_input_adapter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put T' = fc2(GELU(fc1(T))), exact GELU, in the place of TEC's class token T (1, 1, C)."""
    if not any(name.startswith("cls_token_mlp.") for name in tensors):
        return tensors
    parts = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (tensors.pop(f"cls_token_mlp.{part}").float() for part in parts)
    token = tensors["cls_token"]
    hidden = F.gelu(F.linear(token.float(), fc1_weight, fc1_bias))
    return {**tensors, "cls_token": F.linear(hidden, fc2_weight, fc2_bias).to(token.dtype)}
