"""Checkpoints: written atomically, the last two kept, read back without unpickling anything."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from tec_cache.errors import TecCacheError
from tec_cache.store.files import write_atomically, write_durably

_NAME = re.compile(r"^step-(\d{9})\.pt$")
KEEP = 2


def run_file(run: Path) -> Path:
    """Path of the settings of a run."""
    return run / "run.json"


def save_settings(run: Path, settings: dict[str, Any]) -> None:
    """Write the resolved settings of a run."""
    write_atomically(run_file(run), json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n")


def load_settings(run: Path) -> dict[str, Any]:
    """Read the settings of a run. Raises TecCacheError where there is none."""
    try:
        settings: dict[str, Any] = json.loads(run_file(run).read_bytes())
    except (OSError, ValueError) as error:
        raise TecCacheError(
            f"there is no run here: {error}",
            where=str(run),
            todo="give the folder that tec-cache train --out made",
        ) from error
    return settings


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.match(p.name))


def save_checkpoint(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint of a finished step; a kill at any moment leaves the ones before it whole."""
    path = run / "checkpoints" / f"step-{step:09d}.pt"
    try:
        write_durably(path, lambda stream: torch.save(state | {"step": step}, stream))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        free = shutil.disk_usage(run).free
        raise TecCacheError(
            f"the checkpoint of step {step} cannot be written ({free:,} bytes are free): {error}",
            where=str(path),
            todo="make room; the same command goes on from the checkpoint before",
        ) from error
    for old in checkpoints(run)[:-KEEP]:
        old.unlink()
    for left in path.parent.glob(".*.tmp"):
        left.unlink()
    return path


def clear_run(run: Path) -> None:
    """Remove what this project wrote into a run's folder, and nothing else; the settings go last."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run / name, ignore_errors=True)
    for path in (run / "metrics.jsonl", run_file(run)):
        path.unlink(missing_ok=True)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint. Raises TecCacheError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch writes the checksums and does not look at them
        if damaged is not None:
            raise ValueError(f"{damaged} does not fit its checksum")
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if not {"step", "student", "optimizer"} <= set(state):
            raise ValueError("it is not a checkpoint of tec-cache train")
    except Exception as error:
        # torch raises RuntimeError, EOFError, UnpicklingError and others for a damaged file
        raise TecCacheError(
            f"damaged checkpoint: {error}",
            where=str(path),
            todo="remove it; the one before it is used instead",
        ) from error
    return state
