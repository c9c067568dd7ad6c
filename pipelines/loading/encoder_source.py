"""From what a user names to an encoder that can be fine-tuned, with the adapters that lie beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipelines.loading.base_given import RANDOM, load_judged
from tec_cache.base.folders import check_model_hash
from tec_cache.base.load import create
from tec_cache.base.source import Given
from tec_cache.errors import ConfigError, WeightsError
from tec_cache.finetune.classifier import LoadedEncoder
from tec_cache.kinds import ADAPTERS_FILE, EXPORT_FILE, WEIGHTS_FILE
from tec_cache.recipes import BASES
from tec_cache.run.export import ENCODER_ADAPTERS, INPUT_ADAPTER, OF_SET, below
from tec_cache.segment.folder import HEAD
from tec_cache.weights.content import load_content, read_json
from tec_cache.weights.files import sha256_of_state
from tec_cache.weights.load import load_strict


def load_encoder(
    name: str,
    weights: str | Path | None = None,
    *,
    grid: int | None = None,
    given: Given | None = None,
    seed: int = 0,
    tuned: bool = False,
) -> LoadedEncoder:
    """Load an encoder to be fine-tuned.

    name: a folder (an export, timm's, transformers'), a name of `recipes.BASES`, `timm:NAME`, a weight file, or
    `random:NAME` for an untrained one, which is a function of `seed`. weights: a file that replaces the name's own; no
    adapters belong to it. grid: patches per side; None for the model's own. tuned: take an export that was fine-tuned
    as a whole too, without a final norm: its own is of a mean of tokens. Raises ConfigError and WeightsError.
    """
    if tuned and weights is None and _is_tuned(name):
        return _tuned_encoder(Path(name), grid)
    base = load_judged(name, weights, grid=grid, given=given, seed=seed)
    if type(base.model) is not VisionTransformer:
        kind = type(base.model).__name__
        raise ConfigError(f"this model cannot be tuned: {kind}", where=name, todo="use a plain VisionTransformer")
    made_of: dict[str, Any] = {"name": name, **base.identity}
    adapters: dict[str, Tensor] = {}
    # a name of a base or timm's comes before a folder that happens to be called so
    if weights is None and not name.startswith((RANDOM, "timm:")) and name not in BASES and Path(name).is_dir():
        export = _export_of(Path(name))
        if export is not None:
            made_of["export"] = export
            adapters = _adapters_of(Path(name), export)
    return LoadedEncoder(
        model=base.model,
        architecture=str(base.identity["architecture"]).partition(".")[0],
        model_args=dict(base.identity["model_args"]),
        mean=base.mean,
        std=base.std,
        input_adapter_state=below(INPUT_ADAPTER, adapters),
        adapters_states=_of_sets(adapters),
        made_of=made_of,
    )


def _is_tuned(name: str) -> bool:
    """Say whether a name is the folder of an export of ours whose norm follows the mean of the tokens."""
    if name in BASES or name.startswith((RANDOM, "timm:")) or not Path(name).is_dir():
        return False
    made = _export_of(Path(name))
    settings = made.get("settings") if made else None
    return isinstance(settings, dict) and settings.get("task") == "classify" and settings["config"]["tune"] == "full"


def _tuned_encoder(folder: Path, grid: int | None) -> LoadedEncoder:
    """Load the encoder of a fine-tuned export: all but its head and the norm before that."""
    document, made = read_json(folder / EXPORT_FILE), _export_of(folder) or {}
    check_model_hash(folder / WEIGHTS_FILE, str(made["model_sha256"]))
    state = load_content(folder / WEIGHTS_FILE)
    kept = {n: value for n, value in state.items() if not str(n).startswith(("head.", "fc_norm."))}
    left_out = ("global_pool", "fc_norm", "num_classes", "img_size")
    args = {n: v for n, v in document["model_args"].items() if n not in left_out} | {"final_norm": False}
    architecture = str(document["architecture"])
    own = create(architecture, args, 1, str(folder)).patch_embed.patch_size[0]  # type: ignore[union-attr, index]
    model: Any = create(architecture, args, grid or int(document["model_args"]["img_size"]) // int(own), str(folder))
    load_strict(model, kept, what=f"the encoder of {folder}")
    cfg = document["pretrained_cfg"]
    return LoadedEncoder(
        model=model.eval().requires_grad_(False),
        architecture=architecture,
        model_args=args,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        made_of={"name": str(folder), "architecture": architecture, "model_args": args, "export": made}
        | {"weights_sha256": sha256_of_state(kept)},
    )


def _export_of(folder: Path) -> dict[str, Any] | None:
    """Return what an export's config.json says of its making; None for a folder of somebody else's."""
    made = read_json(folder / EXPORT_FILE).get("tec_cache")
    return made if isinstance(made, dict) else None


def _adapters_of(folder: Path, export: dict[str, Any]) -> dict[str, Tensor]:
    """Return the adapters of an export, checked against the hash that its configuration names."""
    expected = export.get("adapters_sha256")
    if expected is None:
        return {}
    file = folder / ADAPTERS_FILE
    check_model_hash(file, str(expected))
    state = load_content(file)
    known = (INPUT_ADAPTER, ENCODER_ADAPTERS, OF_SET, HEAD)
    foreign = [n for n in state if not str(n).startswith(known)]
    if foreign:
        raise WeightsError(f"no name of an adapter: {foreign[0]}", where=str(file), todo="export the run again")
    return state


def _of_sets(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the encoder adapters by target set, "" where there is one for all."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.startswith(ENCODER_ADAPTERS):
            found.setdefault("", {})[name.removeprefix(ENCODER_ADAPTERS)] = value
        elif name.startswith(OF_SET):
            # a set's name may hold dots; a weight's begins with one of the adapters' parts
            match = re.fullmatch(rf"{OF_SET}(.+?)\.((?:norm_before|norm_after|fuse|mlps)\..+)", name)
            if match is None:
                raise WeightsError(f"no name of an adapter: {name}", todo="export the run again")
            found.setdefault(match[1], {})[match[2]] = value
    return found
