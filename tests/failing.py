"""The command line with a fault in one rank, in the middle of a step: `-m tests.failing RANK STEP command ...`.

Leaving the process group takes for ever, as it does in nccl for a rank whose peers wait in an all-reduce.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import torch

import cli
from tec_cache.run.loop import Loop

MESSAGE = "a fault that only this rank has"


def main() -> None:
    rank, step = (int(word) for word in sys.argv[1:3])
    del sys.argv[1:3]
    sys.argv[0] = "tec-cache"
    losses = Loop.losses

    def failing(self: Loop[Any], batch: Any) -> dict[str, torch.Tensor]:
        if int(os.environ["RANK"]) == rank and self.step + 1 == step:
            raise ValueError(MESSAGE)
        return losses(self, batch)

    Loop.losses = failing  # type: ignore[method-assign]
    torch.distributed.destroy_process_group = lambda: threading.Event().wait()
    cli.main()


if __name__ == "__main__":
    main()
