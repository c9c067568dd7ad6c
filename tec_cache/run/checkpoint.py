"""Checkpoints: written atomically, the last two kept, each naming its run and step, and checked when read.

Nothing is unpickled but tensors and plain containers, and nothing is taken up that the run itself could not have
written: another run's weights, another step's, other names, shapes or dtypes, or numbers that are not finite.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from tec_cache.errors import TecCacheError, listed
from tec_cache.run.layout import CHECKPOINT, CHECKPOINTS, FORMAT, checkpoint_file, checkpoints
from tec_cache.store.files import drafts_of, write_durably

_PARTS = {"format": int, "run": str, "step": int, "model": dict, "optimizer": dict, "sums": dict, "summed": int}
KEEP = 2


class GivenUp(Exception):
    """Nobody waits for this checkpoint any more."""


def save_checkpoint(
    run: Path, identity: str, step: int, state: dict[str, Any], *, given_up: Callable[[], bool] = lambda: False
) -> Path:
    """Write the checkpoint of a finished step; a kill at any moment leaves the ones before it whole.

    identity: the run's, from `settings.run_identity`. Older checkpoints of the same run are then removed but for the
    last; a file of another origin stays, whatever its name. given_up: asked while it is written; where it says so,
    nothing of the file stays, and GivenUp is raised.
    """
    path = checkpoint_file(run, step)

    def write(stream: IO[bytes]) -> None:
        torch.save(
            state | {"format": FORMAT, "run": identity, "step": step}, cast(IO[bytes], _Abandonable(stream, given_up))
        )
        if given_up():
            raise GivenUp

    try:
        write_durably(path, write)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        free = shutil.disk_usage(run).free
        raise TecCacheError(
            f"the checkpoint of step {step} cannot be written ({free:,} bytes are free): {error}",
            where=str(path),
            todo="make room; the same command goes on from the checkpoint before",
        ) from error
    for old in [p for p in checkpoints(run) if _names_run(p, identity)][:-KEEP]:
        old.unlink()
    for left in drafts(run):
        left.unlink()
    return path


class _Abandonable:
    """A stream that writes nothing more once it is given up: an error here would come out as another one of torch's."""

    def __init__(self, stream: IO[bytes], given_up: Callable[[], bool]) -> None:
        self._stream, self._given_up = stream, given_up

    def write(self, data: Any) -> int:
        return len(data) if self._given_up() else self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()


def drafts(run: Path) -> list[Path]:
    """List the unfinished checkpoints that killed jobs left."""
    folder, draft = run / CHECKPOINTS, drafts_of(CHECKPOINT.pattern)
    return [p for p in folder.iterdir() if draft.fullmatch(p.name)] if folder.is_dir() else []


def load_checkpoint(path: Path, identity: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of the run of that identity.

    Returns {"format", "run", "step", "model", "optimizer", "sums", "summed"}; `require_weights` and the optimizer
    check the tensors. Raises TecCacheError for a damaged file, another run's or format's, and one whose step is not the
    one in its name.
    """
    if not path.is_file():
        raise unfit(path, "there is no such checkpoint" if not path.exists() else "a checkpoint is a file")
    try:
        _require_undamaged(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        # torch raises RuntimeError, EOFError, UnpicklingError and others for a damaged file
        raise unfit(path, f"damaged checkpoint: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(state, dict) or not {"run", "step"} <= set(state):
        raise unfit(path, "this is not a checkpoint of tec-cache")
    found, odd = state.get("format", 1), sorted(map(str, set(state) ^ set(_PARTS)))
    if found != FORMAT:
        raise unfit(path, f"this checkpoint is of format {found!s:.20}, this program's are of {FORMAT}")
    if odd:
        raise unfit(path, f"damaged checkpoint: its parts differ in {listed(odd)}")
    wrong = [name for name, kind in _PARTS.items() if type(state[name]) is not kind]
    if wrong:
        raise unfit(path, f"damaged checkpoint: {wrong[0]} is a {type(state[wrong[0]]).__name__}")
    if state["run"] != identity:
        raise unfit(path, "this checkpoint is another run's")
    step, summed, name = state["step"], state["summed"], CHECKPOINT.fullmatch(path.name)
    if not 1 <= step < 10**9 or not 0 <= summed <= step:
        raise unfit(path, f"damaged checkpoint: step {step}, {summed} of them to be averaged")
    if name is not None and int(name[1]) != step:
        raise unfit(path, f"this checkpoint is of step {step}, its name says {int(name[1])}")
    return state


def require_weights(state: Mapping[Any, Any], model: nn.Module, path: Path) -> None:
    """Refuse weights that are not exactly a model's: in names, shapes, dtypes, and finite.

    The model may lie on the meta device: nothing of it is read but the shapes.
    """
    own = model.state_dict()
    require_tensors(state, {name: (value.shape, value.dtype) for name, value in own.items()}, path, "the model")


def require_tensors(
    given: Mapping[Any, Any], wanted: Mapping[str, tuple[torch.Size, torch.dtype]], path: Path, what: str
) -> None:
    """Refuse what is not exactly these tensors: names, shapes, dtypes, and finite. Raises TecCacheError."""
    for fault, names in (("lacks", wanted.keys() - given.keys()), ("has besides", given.keys() - wanted.keys())):
        if names:
            raise unfit(path, f"{what} {fault} {listed(sorted(map(str, names)))}")
    for name, (shape, dtype) in wanted.items():
        value = given[name]
        if type(value) is not Tensor or value.layout != torch.strided:
            raise unfit(path, f"{name} of {what} is no plain tensor")
        if (value.shape, value.dtype) != (shape, dtype):
            found, right = (f"{tuple(s)} {str(d).removeprefix('torch.')}" for s, d in
                            ((value.shape, value.dtype), (shape, dtype)))  # fmt: skip
            raise unfit(path, f"{name} of {what} is {found}, it should be {right}")
        if not value.isfinite().all():
            raise unfit(path, f"{name} of {what} is not finite")


def unfit(path: Path, what: str) -> TecCacheError:
    """Return the error for a checkpoint that is not taken up; its remedy names the one that is used instead."""
    todo = "give another --checkpoint"
    if CHECKPOINT.fullmatch(path.name):
        older = [p.name for p in checkpoints(path.parent.parent) if p.name < path.name]
        todo = f"remove it: {older[-1]}, the one before it, is then used" if older else (
            "remove it: there is none before it, so the run then begins anew")  # fmt: skip
    return TecCacheError(what, where=str(path), todo=todo)


def _require_undamaged(path: Path) -> None:
    """Raise unless the file is a zip whose members fit their checksums, which torch writes and does not look at."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = [m for m in members if m.compress_type != zipfile.ZIP_STORED]
        if packed or sum(m.file_size for m in members) > path.stat().st_size:
            raise ValueError("its members are compressed or overlap, which torch never writes")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} does not fit its checksum")


def _names_run(path: Path, identity: str) -> bool:
    """Say whether a checkpoint names this run, without reading its tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            (pickle,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return identity.encode() in archive.read(pickle)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
