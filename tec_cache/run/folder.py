"""A run's folder: what in it is the run's own, what is not, and how the run is removed.

A folder is a run's when it holds a run.json of ours. Of such a folder only these files are ever removed, by exact
name: checkpoints, metrics.jsonl, event files that carry the run's identity, and unfinished copies of them.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from tec_cache.cache.layout import LOCK
from tec_cache.errors import TecCacheError, listed
from tec_cache.kinds import RUN_FILE
from tec_cache.run.checkpoint import drafts
from tec_cache.run.layout import BOARD, CHECKPOINTS, METRICS_FILE, checkpoints, metrics_file, run_file
from tec_cache.run.metrics import board_files
from tec_cache.run.settings import load_settings, run_identity
from tec_cache.store.files import drafts_of

_DRAFT = drafts_of("|".join(map(re.escape, (RUN_FILE, METRICS_FILE))))


def begun_run(run: Path, task: str) -> dict[str, Any] | None:
    """Return the settings of the run in a folder, None where the folder is empty or not there.

    Raises TecCacheError where something lies in it that is no run of this task.
    """
    if run_file(run).exists():
        return load_settings(run, task)
    others = [p.name for p in _entries(run) if p.name != LOCK and not _DRAFT.fullmatch(p.name)]
    if others:
        raise TecCacheError(
            f"this folder holds something that is no run of tec-cache: {listed(others)}",
            where=str(run),
            todo="name another --out; what lies here can only be removed by you",
        )
    return None


def clear_run(run: Path, settings: dict[str, Any]) -> None:
    """Remove what the run of these settings wrote, but for run.json, which the next one's then replaces.

    Newest first, so that a kill leaves a run that goes on from an older checkpoint, or begins anew.
    """
    own = [*reversed(checkpoints(run)), *drafts(run), *board_files(run, run_identity(settings)), metrics_file(run)]
    for path in [*own, *(p for p in _entries(run) if _DRAFT.fullmatch(p.name))]:
        path.unlink(missing_ok=True)
    for folder in (run / CHECKPOINTS, run / BOARD):
        with suppress(OSError):  # it holds something that is not the run's, or is not there
            folder.rmdir()


def foreign_files(run: Path, identity: str) -> list[str]:
    """List what lies in a run's folder and is not the run's, by names relative to it."""
    own = {*checkpoints(run), *drafts(run), *board_files(run, identity), metrics_file(run), run_file(run), run / LOCK}
    found: list[Path] = []
    for path in _entries(run):
        inside = path.name in (CHECKPOINTS, BOARD) and path.is_dir()
        found += _entries(path) if inside else [path]
    return [str(p.relative_to(run)) for p in found if p not in own and not _DRAFT.fullmatch(p.name)]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
