"""What a training run did so far, and how it goes on: from its settings, its metrics and its checkpoints' names."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tec_cache.printable import shell_words

TAIL = 1 << 18
"""Bytes at the end of metrics.jsonl that are read: a minute of lines, and many more."""
MINUTE = 60.0
TIMED = ("images_per_second", "waited", "seconds")
"""The numbers of a line that say how fast the steps since the line before it were."""


def describe_run(place: Path) -> dict[str, Any]:
    """Describe a run as plain values. Raises TecCacheError where its settings cannot be understood."""
    from tec_cache.run.layout import checkpoints, metrics_file, step_of
    from tec_cache.run.settings import load_settings

    settings = load_settings(place)
    kept = checkpoints(place)
    step = step_of(kept[-1]) if kept else 0
    file = metrics_file(place)
    lines = last_lines(file)
    logged = dict(lines[-1]) if lines else {}
    for name in TIMED:
        logged.pop(name, None)
    task, total = settings["task"], settings["total_steps"]
    step_now = max(step, int(logged.get("step", 0)))
    tuned = ("recipe", "model", "num_classes", "classes")
    own = {"pretrain": ("targets", "num_views"), "classify": (*tuned, "rule"), "segment": tuned}[task]
    return {
        "run": str(place),
        "task": task,
        "config": settings["config"],
        **{name: settings[name] for name in own},
        **({"cache_fingerprint": settings["cache"]} if task == "pretrain" else {}),
        "step": step,
        "total_steps": total,
        "finished": step >= total,
        "checkpoints": [path.name for path in kept],
        "logged": logged,
        **speed_of(lines, (total - step_now) * int(settings["config"]["batch_size"])),
        "logged_seconds_ago": _age(file) if lines else None,
        "go_on": go_on_command(task, settings["config"], str(place)),
    }


def speed_of(lines: Sequence[dict[str, float]], images_left: int) -> dict[str, float]:
    """Say how fast a run was at its last lines, and how long the rest takes at that speed.

    Returns images_per_second and waited of the last line, minute_images_per_second of the lines of its last minute,
    and seconds_left; nothing of what the lines do not say.
    """
    if not lines or any(name not in lines[-1] for name in TIMED):
        return {}
    found = {name: lines[-1][name] for name in ("images_per_second", "waited")}
    images = seconds = 0.0
    for line in reversed(lines):
        if seconds >= MINUTE or any(name not in line for name in TIMED):
            break
        images, seconds = images + line["images_per_second"] * line["seconds"], seconds + line["seconds"]
    if images > 0 and seconds > 0:
        found["minute_images_per_second"] = images / seconds
        found["seconds_left"] = max(0, images_left) * seconds / images
    return found


def _age(file: Path) -> float | None:
    """Return the seconds since a file was last written."""
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except OSError:
        return None


def last_lines(file: Path) -> list[dict[str, float]]:
    """Return the last whole lines of metrics.jsonl, finite numbers alone; none where there is no file."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL))
            lines = stream.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # cut in half by a kill, or by where the reading began
            continue
        if isinstance(values, dict):
            found.append({n: v for n, v in values.items() if isinstance(v, int | float) and math.isfinite(v)})
    return found


def go_on_command(task: str, config: dict[str, Any], run: str) -> str:
    """Return the command that goes on with a run: what it leaves out is taken from run.json."""
    from tec_cache.run.settings import PROGRAMS

    model = [config["model"]] if "model" in config else []
    return shell_words(["tec-cache", PROGRAMS[task], *model, "--out", run])
