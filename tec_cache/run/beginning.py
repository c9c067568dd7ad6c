"""Where a run begins: anew, or at a checkpoint of the run that lies in its folder, which must be the same."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tec_cache.cache.identity import require_same
from tec_cache.cache.lock import writing
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.run.checkpoint import checkpoints
from tec_cache.run.folder import begun_run, clear_run
from tec_cache.run.settings import comparable, run_identity, save_settings


class Start(NamedTuple):
    """Where a run begins."""

    begun: dict[str, Any] | None
    """The settings of the run that lies in the folder."""
    checkpoint: Path | None
    """The checkpoint to go on from."""
    identity: str
    """The identity of the run that goes on or begins."""


def find_start(run: Path, settings: dict[str, Any], *, overwrite: bool) -> Start:
    """Look for a checkpoint to go on from, after checking that what lies in the folder is the same run."""
    begun = begun_run(run, settings["task"])
    if begun is None or overwrite:
        return Start(begun, None, run_identity(settings))
    require_same(
        comparable(begun),
        comparable(settings),
        what="the run",
        where=str(run),
        todo="give the settings as they were, name another --out, or replace it with --overwrite",
    )
    found = checkpoints(run)
    return Start(begun, found[-1] if found else None, run_identity(begun))


def begin_run(run: Path, settings: dict[str, Any], *, overwrite: bool, ranks: Ranks, lock: ExitStack) -> Start:
    """Lock the run's folder until `lock` is closed; empty it and write the settings unless a run goes on.

    Looks again for a checkpoint: a job that held the lock may have written one while this one waited.
    """
    if overwrite and ranks.world_size > 1:
        raise ConfigError("--overwrite in several processes at once", todo="remove the run's folder yourself")
    try:
        lock.enter_context(writing(run, "this run", ranks))
        start = find_start(run, settings, overwrite=overwrite)
        if start.checkpoint is None and ranks.main:
            if start.begun is not None:
                clear_run(run, start.begun)
            if start.begun is None or overwrite:
                save_settings(run, settings)
    except OSError as error:
        raise TecCacheError(
            f"the run cannot be written: {error.strerror}", where=str(run), todo="choose another --out"
        ) from error
    return start
