"""What an exported model is, and from which run it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tec_cache.documents import read_as
from tec_cache.kinds import EXPORT_FILE, WEIGHTS_FILE


class _Settings(msgspec.Struct):
    config: dict[str, Any]
    task: str
    targets: list[dict[str, Any]] | None = None
    cache: str | None = None
    recipe: str | None = None
    num_classes: int | None = None


class _Origin(msgspec.Struct):
    settings: _Settings
    step: int
    model_sha256: str
    scores: dict[str, float] | None = None


class ExportDocument(msgspec.Struct):
    """What is asked of config.json."""

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    tec_cache: _Origin


def describe_export(place: Path) -> dict[str, Any]:
    """Describe an export as plain values; its weights are read, as `--base` reads them.

    Raises TecCacheError where its configuration cannot be understood, WeightsError where its weights cannot be used.
    """
    from tec_cache.base.folders import check_model_hash
    from tec_cache.base.load import find_source, read_state
    from tec_cache.weights.content import load_content
    from tec_cache.weights.files import sha256_of_state

    document = read_as(place / EXPORT_FILE, ExportDocument)
    origin = document.tec_cache
    settings = origin.settings
    if settings.targets is not None:
        state = read_state(find_source(str(place), None), str(place))
    else:  # a fine-tuned model is no base: its head, and its norm after the pooling, are its own
        check_model_hash(place / WEIGHTS_FILE, origin.model_sha256)
        state = load_content(place / WEIGHTS_FILE)
    if settings.targets is not None:
        own: dict[str, Any] = {
            "targets": settings.targets,
            "cache": settings.config.get("cache"),
            "cache_fingerprint": settings.cache,
        }
    else:
        own = {"recipe": settings.recipe, "num_classes": settings.num_classes, "scores": origin.scores or {}}
        own["train"] = settings.config.get("train")
    return {
        "export": str(place),
        "architecture": document.architecture,
        "model_args": document.model_args,
        "mean": document.pretrained_cfg.get("mean"),
        "std": document.pretrained_cfg.get("std"),
        "parameters": sum(value.numel() for value in state.values()),
        "weights_sha256": sha256_of_state(state),
        "run": settings.config.get("out"),
        "task": settings.task,
        "step": origin.step,
        **own,
    }
