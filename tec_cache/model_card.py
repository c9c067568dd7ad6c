"""README.md of a model: what it is, what it learned from, under whose licence, how, and how far it got.

Everything comes from config.json, so that the same export has the same card. Places on a disk are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from tec_cache.licences import UNKNOWN, Licence, licence_of
from tec_cache.printable import counted, printable
from tec_cache.urls import without_secrets

_ORIGIN = "TEC, target-enhanced conditional mask-reconstruction ([arXiv 2210.11016](https://arxiv.org/abs/2210.11016))"
_USAGE = """import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True)  # or hf-hub:OWNER/NAME, once it is pushed"""
_SCORES = {
    "test_top1": "top-1",
    "test_top5": "top-5",
    "test_miou": "mean IoU",
    "test_pixel_accuracy": "pixels right",
    "test_mean_accuracy": "mean accuracy of classes",
    "probe_knn": "nearest neighbours, frozen",
    "probe_linear": "linear probe, frozen",
}
_RECIPE = ("epochs", "batch_size", "base_lr", "weight_decay", "mask_ratio", "adapters", "seed", "tune", "head")


def model_card(
    description: Mapping[str, Any],
    made: Mapping[str, Any],
    *,
    usage: str = _USAGE,
    library: str = "timm",
    notes: Iterable[str] = (),
) -> str:
    """Return the card, in Markdown with the hub's heading.

    description: config.json without "tec_cache"; made: what stands there. usage: Python that loads the model, FOLDER
    for its place. library: by the hub's name. notes: lines that only this form of the model needs.
    """
    settings = made.get("settings") or {}
    bases = bases_of(made)
    licences = {licence_of(base) for base in bases} or {UNKNOWN}
    sections = [
        _heading(licences, library, settings.get("task")),
        f"# {_cell(description['architecture'])}, trained by tec-cache",
        _what(description, settings),
        "```python\n" + usage + "\n```",
        *([_list("This form of the model", notes)] if notes else []),
        _list("Bases and licence", _licence_lines(bases)),
        _list("Recipe", _recipe_lines(settings, made)),
        _list("Numbers reached", _score_lines(settings, made)),
        _list("Identity", _identity_lines(settings, made)),
    ]
    return "\n\n".join(sections) + "\n"


def bases_of(made: Mapping[str, Any]) -> list[str]:
    """Return what an exported model learned from, by name: target sets, a base in the loop, "pixels", or an export's.

    A tuned model names what its encoder learned from, as the run noted it; where that was no export, the model that was
    tuned.
    """
    settings = made.get("settings") or {}
    if settings.get("task") == "pretrain":
        return [_base(targets) for targets in _targets(settings)]
    noted = (settings.get("notes") or {}).get("bases")
    if noted is not None:
        return [str(base) for base in json.loads(noted)]
    return [_place(str((settings.get("config") or {}).get("model", "unknown")))]


def _targets(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the sources of targets; the first exports had one, not in a list."""
    targets = settings.get("targets") or []
    return [targets] if isinstance(targets, Mapping) else [of for of in targets if isinstance(of, Mapping)]


def tuned(name: str) -> dict[str, Any]:
    """Return what `bases_of` takes for a model that is no export: its name is all that is known."""
    return {"settings": {"config": {"model": name}}}


def _base(targets: Mapping[str, Any]) -> str:
    """Name one source of targets."""
    if targets.get("kind") == "pixels":
        return "pixels"
    base = targets.get("base")
    architecture = base.get("architecture") if isinstance(base, dict) else None
    return str(targets.get("name") or targets.get("goal") or architecture or "unknown")


def _place(name: str) -> str:
    """Return the last part of a path: the rest is nobody's business but the writer's."""
    return PurePath(without_secrets(name)).name or name


def _cell(value: object) -> str:
    """Write a name that came from a file or a user so that Markdown leaves it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(str(value)))


def _heading(licences: set[Licence], library: str, task: object) -> str:
    only = next(iter(licences)).hub if len(licences) == 1 else "other"
    tag = {"classify": "image-classification", "segment": "image-segmentation"}.get(
        str(task), "image-feature-extraction"
    )
    tags = "\n".join(f"- {name}" for name in (tag, library, "tec-cache"))
    return f"---\nlibrary_name: {library}\nlicense: {only}\npipeline_tag: {tag}\ntags:\n{tags}\n---"


def _what(description: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    size = description["pretrained_cfg"]["input_size"][-1]
    alone = all(of.get("kind") == "pixels" for of in _targets(settings))
    taught = "as a masked autoencoder, from pixels alone" if alone else f"by {_ORIGIN}"
    kinds = {
        "pretrain": f"A vision transformer, trained without labels {taught}.",
        "classify": "A vision transformer with a classifier, tuned on labelled photos.",
        "segment": "The encoder of a segmenter, tuned on photos with masks.",
    }
    arguments = ", ".join(f"{name} {value}" for name, value in sorted(description["model_args"].items()))
    cfg = description["pretrained_cfg"]
    return (
        f"{kinds.get(str(settings.get('task')), 'A vision transformer.')} Images of {size} x {size} pixels, normalized "
        f"by mean {cfg['mean']} and deviation {cfg['std']}. Model: {_cell(arguments)}."
    )


def _list(title: str, lines: Iterable[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence_lines(bases: list[str]) -> list[str]:
    lines = [
        f"{_cell(base)}: no base, the photos alone" if base == "pixels" else f"{_cell(base)}: {licence_of(base).name}"
        for base in bases
    ]
    note = (
        "Bases are known by the names they were given. Whether their licences, and that of the photos, bind this model"
    )
    return [*lines, f"{note} is for whoever hands it on to find out."]


def _recipe_lines(settings: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    config = settings.get("config") or {}
    recipe = [f"recipe: {_cell(settings['recipe'])}"] if settings.get("recipe") else []
    chosen = [f"{name.replace('_', ' ')}: {_cell(config[name])}" for name in _RECIPE if config.get(name) is not None]
    total = settings.get("total_steps")
    return [*recipe, *chosen, f"step: {made.get('step')}" + (f" of {total}" if total else "")]


def _score_lines(settings: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    scores = made.get("scores") or {}
    shown = [f"{title}: {scores[name]:.2%}" for name, title in _SCORES.items() if name in scores]
    if shown and scores.get("test_images"):
        shown.append(f"judged on {counted(int(scores['test_images']), 'photo')}, at step {int(scores['step']):,}")
    return shown or ["none: it has not been judged in its own run; tec-cache probe, finetune and segment do that"]


def _identity_lines(settings: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    lines = [f"run: `{made['run']}`"] if made.get("run") else []
    if settings.get("cache"):
        lines.append(f"cache (views): `{settings['cache']}`, {counted(int(settings.get('num_views') or 0), 'view')}")
    for targets in _targets(settings):
        if targets.get("fingerprint"):
            lines.append(f"targets {_cell(_base(targets))}: `{targets['fingerprint']}`")
    for photos in ("train", "test"):
        if isinstance(settings.get(photos), str):
            lines.append(f"photos, {photos}: `{printable(settings[photos])[:64]}`")
    return [*lines, f"weights, SHA-256 of model.safetensors: `{made.get('model_sha256')}`"]


def run_metadata(made: Mapping[str, Any]) -> dict[str, str]:
    """Return what a weight file says of its run, for whoever has that file alone: {"tec_cache": JSON}."""
    settings = made.get("settings") or {}
    about = {
        "run": made.get("run"),
        "task": settings.get("task"),
        "step": made.get("step"),
        "bases": bases_of(made),
        "cache": settings.get("cache"),
    }
    return {"tec_cache": json.dumps({name: value for name, value in about.items() if value is not None})}
