"""Where things lie in a run's folder. Every name in it is made here, but for run.json, by which a run is known.

RUN/
  run.json                              settings, and what the run learns from
  metrics.jsonl                         a line for every few steps
  checkpoints/step-000000500.pt         the last ones
  tensorboard/events.out.tfevents.*     the same numbers for TensorBoard, which names these files
  .lock                                 `cache.layout.LOCK`
"""

from __future__ import annotations

import re
from pathlib import Path

from tec_cache.kinds import RUN_FILE

FORMAT = 4
"""Of run folders and checkpoints; another one is refused. 1 had no number, and the student alone; 2 no schedule; 3 knew
one target set."""

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
BOARD = "tensorboard"
CHECKPOINT = re.compile(r"step-(\d{9})\.pt")


def run_file(run: Path) -> Path:
    """Path of the settings of a run."""
    return run / RUN_FILE


def metrics_file(run: Path) -> Path:
    """Path of the metrics of a run."""
    return run / METRICS_FILE


def checkpoint_file(run: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return run / CHECKPOINTS / f"step-{step:09d}.pt"


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name) and p.is_file())


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name, 0 for another name."""
    match = CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else 0
