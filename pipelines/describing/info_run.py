"""What a training run did so far, and how it goes on: from its settings, its metrics and its checkpoints' names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pipelines.describing.command_words import option_words
from tec_cache.printable import shell_words

TAIL = 1 << 16
"""Bytes at the end of metrics.jsonl that hold its last line."""


def describe_run(place: Path) -> dict[str, Any]:
    """Describe a run as plain values. Raises TecCacheError where its settings cannot be understood."""
    from tec_cache.run.checkpoint import checkpoints
    from tec_cache.run.layout import metrics_file, step_of
    from tec_cache.run.settings import load_settings

    settings = load_settings(place)
    kept = checkpoints(place)
    step = step_of(kept[-1]) if kept else 0
    logged = last_metrics(metrics_file(place))
    speed: dict[str, Any] = {name: logged.pop(name) for name in ("images_per_second", "waited") if name in logged}
    task = settings["task"]
    tuned = ("recipe", "model", "num_classes", "classes")
    own = {"pretrain": ("targets", "num_views"), "classify": (*tuned, "rule"), "segment": tuned}[task]
    return {
        "run": str(place),
        "task": task,
        "config": settings["config"],
        **{name: settings[name] for name in own},
        **({"cache_fingerprint": settings["cache"]} if task == "pretrain" else {}),
        "step": step,
        "total_steps": settings["total_steps"],
        "finished": step >= settings["total_steps"],
        "checkpoints": [path.name for path in kept],
        "logged": logged,
        **speed,
        "go_on": go_on_command(task, _unfinished(settings["config"], step), str(place)),
    }


def _unfinished(config: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the settings without a number of steps that has been done."""
    steps = config.get("steps")
    return config | {"steps": None} if isinstance(steps, int) and steps <= step else config


def last_metrics(file: Path) -> dict[str, float]:
    """Return the last whole line of metrics.jsonl; empty where there is none."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL))
            lines = stream.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # cut in half by a kill
            continue
        if isinstance(values, dict):
            return {n: v for n, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
    return {}


def go_on_command(task: str, config: dict[str, Any], run: str) -> str:
    """Return the command that goes on with a run: its settings that are not the defaults."""
    from tec_cache.run.settings import CONFIGS, PROGRAMS

    model = [config["model"]] if "model" in config else []
    return shell_words(["tec-cache", PROGRAMS[task], *model, *option_words(CONFIGS[task], config | {"out": run})])
