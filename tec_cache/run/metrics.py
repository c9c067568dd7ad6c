"""metrics.jsonl, always, and TensorBoard beside it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tec_cache.paths import encodable
from tec_cache.store.files import make_folder, write_atomically


class Metrics:
    """Appends one JSON object per logged step; on resume, what came after the checkpoint is cut off."""

    def __init__(self, run: Path, *, resume_step: int, tensorboard: bool = True) -> None:
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= resume_step]
            write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        self._file = self.path.open("a", buffering=1)
        self._board: Any = None
        self._folder = ExitStack()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = make_folder(run / "tensorboard")
            self._board = SummaryWriter(self._folder.enter_context(encodable(folder)), purge_step=resume_step + 1)

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


def _step(line: str) -> int:
    """Return the step of a line; a line that a kill cut in half belongs to no step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
