"""What a run has logged so far, read so that nothing in the file can stop the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tec_cache.run.layout import metrics_file
from tec_cache.run.metrics import OF_SETS, is_loss, is_score


@dataclass(frozen=True)
class Logged:
    """The lines of metrics.jsonl that can be read, in the order of their steps."""

    lines: list[dict[str, float]]
    unreadable: int
    """Lines that are damaged, the half line of a run that is writing included."""
    steps_per_epoch: float

    @property
    def names(self) -> list[str]:
        """Of all numbers, in the order in which they first come."""
        return list(dict.fromkeys(name for line in self.lines for name in line))

    @property
    def losses(self) -> list[str]:
        """Names of the losses: loss is their weighted sum, the others are terms: "feature", or "SET/feature"."""
        return [name for name in self.names if is_loss(name)]

    @property
    def scores(self) -> list[str]:
        """Names of what judgements found: probe_... and test_... ."""
        return [name for name in self.names if is_score(name) and name != "test_images"]

    @property
    def of_sets(self) -> list[str]:
        """Names of the norms of the sets' gradients and of the weights that follow them, where these were measured."""
        return [name for name in self.names if name.endswith(OF_SETS)]

    def points(self, name: str) -> tuple[list[float], list[float]]:
        """Return epochs and values of a number."""
        found = [(line["step"] / self.steps_per_epoch, line[name]) for line in self.lines if name in line]
        return [x for x, _ in found], [y for _, y in found]

    def renamed(self, names: Mapping[str, str]) -> Logged:
        """Return the same with other names for some numbers."""
        return replace(self, lines=[{names.get(name, name): v for name, v in line.items()} for line in self.lines])

    def last(self, name: str) -> float | None:
        """Return the last value of a number."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)


def read_logged(run: Path, about: dict[str, Any]) -> Logged:
    """Read a run's metrics; no file is no line. Values that are no finite numbers are left out."""
    try:
        texts = metrics_file(run).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        texts = []
    lines: dict[float, dict[str, float]] = {}
    unreadable = 0
    for text in texts:
        values = _numbers(text)
        if "step" not in values or values["step"] < 0:
            unreadable += 1
            continue
        lines[values["step"]] = lines.get(values["step"], {}) | values
    epochs = about["config"].get("epochs") or 1
    return Logged([lines[step] for step in sorted(lines)], unreadable, max(about["total_steps"] / epochs, 1e-9))


def _numbers(text: str) -> dict[str, float]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    numbers = {n: v for n, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name: float(value) for name, value in numbers.items() if abs(value) < 1e300 and math.isfinite(value)}
