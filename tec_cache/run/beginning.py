"""Where a run begins: anew, or at a checkpoint of the run that lies in its folder, which must be the same."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tec_cache.cache.identity import differences, require_same
from tec_cache.cache.lock import writing
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.printable import counted
from tec_cache.run.extending import Extension, lengthened
from tec_cache.run.folder import begun_run, clear_run
from tec_cache.run.layout import checkpoints, step_of
from tec_cache.run.settings import comparable, run_identity, save_settings


class Start(NamedTuple):
    """Where a run begins."""

    begun: dict[str, Any] | None
    """The settings of the run that lies in the folder."""
    checkpoint: Path | None
    """The checkpoint to go on from."""
    identity: str
    """The identity of the run that goes on or begins."""
    extensions: list[Extension]
    """How its length was changed, this time included."""


def find_start(run: Path, settings: dict[str, Any], *, overwrite: bool, extend: bool = False) -> Start:
    """Look for a checkpoint to go on from, after checking that what lies in the folder is the same run.

    extend: it may be one of another number of epochs, which becomes one of as many as the settings say.
    """
    begun = begun_run(run, settings["task"])
    if extend and (begun is None or overwrite):
        what = "--extend and --overwrite" if overwrite else "--extend: there is no run here yet"
        raise ConfigError(what, where=str(run), todo=f"leave out --extend{' or --overwrite' * overwrite}")
    if begun is None or overwrite:
        return Start(begun, None, run_identity(settings), [])
    epochs, before, asked = settings["config"]["epochs"], begun["config"]["epochs"], comparable(settings)
    as_long = asked | {"config": asked["config"] | {"epochs": before}}
    todo = "give the settings as they were, name another --out, or replace it with --overwrite"
    if settings["task"] == "pretrain" and epochs < before and not differences(comparable(begun), as_long):
        todo = f"to stop early, give --epochs {before} with --steps; or {todo}"
    elif settings["task"] == "pretrain" and epochs > before and not differences(comparable(begun), as_long):
        todo = f"go on with it under the schedule of {counted(epochs, 'epoch')} by --extend; or {todo}"
    require_same(comparable(begun), as_long if extend else asked, what="the run", where=str(run), todo=todo)
    found = checkpoints(run)
    step = step_of(found[-1]) if found else 0
    extensions = lengthened(begun, epochs, step, str(run))
    return Start(begun, found[-1] if found else None, run_identity(begun), extensions)


def begin_run(
    run: Path, settings: dict[str, Any], *, overwrite: bool, ranks: Ranks, lock: ExitStack, extend: bool = False
) -> Start:
    """Lock the run's folder until `lock` is closed; empty it and write the settings unless a run goes on.

    Looks again for a checkpoint: a job that held the lock may have written one while this one waited.
    """
    if overwrite and ranks.world_size > 1:
        raise ConfigError("--overwrite in several processes at once", todo="remove the run's folder yourself")
    try:
        lock.enter_context(writing(run, "this run", ranks))
        start = find_start(run, settings, overwrite=overwrite, extend=extend)
        if start.checkpoint is None and ranks.main:
            if start.begun is not None:
                clear_run(run, start.begun)
            if start.begun is None or overwrite:
                save_settings(run, settings)
        begun = None if overwrite or not ranks.main else start.begun
        if begun is not None and start.extensions != begun.get("extensions", []):
            save_settings(run, _longer(begun, settings, start.extensions))
    except OSError as error:
        raise TecCacheError(
            f"the run cannot be written: {error.strerror}", where=str(run), todo="choose another --out"
        ) from error
    return start


def _longer(begun: dict[str, Any], settings: dict[str, Any], extensions: list[Extension]) -> dict[str, Any]:
    """Return run.json of a run that is lengthened: as it was begun, but for its length."""
    config = begun["config"] | {"epochs": settings["config"]["epochs"]}
    return begun | {"config": config, "total_steps": settings["total_steps"], "extensions": extensions}
