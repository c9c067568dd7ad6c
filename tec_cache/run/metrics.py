"""metrics.jsonl, always, and TensorBoard beside it."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tec_cache.paths import encodable
from tec_cache.run.layout import BOARD, metrics_file
from tec_cache.store.files import make_folder, write_atomically


class Metrics:
    """Appends one JSON object per logged step; on resume, what came after the checkpoint is cut off.

    identity: the run's; the names of its event files end with it, so that they can be told from others.
    """

    def __init__(self, run: Path, identity: str, *, resume_step: int, tensorboard: bool = True) -> None:
        self.path = metrics_file(run)
        if self.path.exists():
            kept = [line for line in self.path.read_text(errors="replace").splitlines() if _step(line) <= resume_step]
            write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        self._file = self.path.open("a", buffering=1)
        self._board: Any = None
        self._folder = ExitStack()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder.enter_context(encodable(make_folder(run / BOARD)))
            self._board = SummaryWriter(folder, purge_step=resume_step + 1, filename_suffix=_suffix(identity))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the numbers of a finished step (counted from 1)."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        self._folder.close()


SPEED = ("images_per_second", "waited", "seconds")
"""Names of the numbers that differ between two equal runs. All are of the steps since the line before: images per
second, the share of the time in which the training waited for its loader, and the seconds without judging."""
_OF_THE_STEP = {"step", "epoch", "lr", "grad_norm", *SPEED}
_SCORE = re.compile(r"(probe|test)_\w+")
OF_SETS = ("/gradient", "/weight")
"""How the numbers end that say how several target sets pull: see `tasks.gradients`."""


def is_score(name: str) -> bool:
    """Say whether a number of a line is what a judgement found."""
    return _SCORE.fullmatch(name) is not None


def is_loss(name: str) -> bool:
    """Say whether a number of a line is a loss: "loss", or a term of it, "feature" or "SET/feature"."""
    return name not in _OF_THE_STEP and not is_score(name) and not name.endswith(OF_SETS)


def board_files(run: Path, identity: str) -> list[Path]:
    """List the event files that the run of an identity wrote."""
    return sorted((run / BOARD).glob(f"events.out.tfevents.*{_suffix(identity)}"))


def _suffix(identity: str) -> str:
    return f".{identity[:16]}"


def _step(line: str) -> int:
    """Return the step of a line; a line that a kill cut in half belongs to no step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 2**62


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl of a run."""
    return [json.loads(line) for line in metrics_file(run).read_text().splitlines()]
