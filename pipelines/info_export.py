"""What an exported model is, and from which run it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tec_cache.documents import read_as
from tec_cache.kinds import EXPORT_FILE


class _Settings(msgspec.Struct):
    config: dict[str, Any]
    targets: dict[str, Any]
    cache: str


class _Origin(msgspec.Struct):
    settings: _Settings
    step: int


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
    from tec_cache.base.load import find_source, read_state
    from tec_cache.weights.files import sha256_of_state

    document = read_as(place / EXPORT_FILE, ExportDocument)
    state = read_state(find_source(str(place), None), str(place))
    origin = document.tec_cache
    return {
        "export": str(place),
        "architecture": document.architecture,
        "model_args": document.model_args,
        "mean": document.pretrained_cfg.get("mean"),
        "std": document.pretrained_cfg.get("std"),
        "parameters": sum(value.numel() for value in state.values()),
        "weights_sha256": sha256_of_state(state),
        "run": origin.settings.config.get("out"),
        "step": origin.step,
        "targets": origin.settings.targets,
        "cache": origin.settings.config.get("cache"),
        "cache_fingerprint": origin.settings.cache,
    }
