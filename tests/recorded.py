"""The command line, keeping every gradient that is stepped with and how much each step sent.

`python -m tests.recorded FOLDER COMMAND...`, started by torchrun or alone. Hooks of torch itself see both, so that
nothing here knows how the training is written.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.parallel
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Recorded(torch.nn.parallel.DistributedDataParallel):
    """DDP that counts the numbers it sends."""

    sent = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, self.count)

    @staticmethod
    def count(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses types that are written as text
        Recorded.sent += bucket.buffer().numel()
        return allreduce_hook(torch.distributed.group.WORLD, bucket)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    steps: list[dict[str, Any]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        values = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        steps.append({"gradient": torch.cat(values).clone(), "sent": Recorded.sent})
        Recorded.sent = 0
        torch.save(steps, folder / f"rank-{os.environ.get('RANK', '0')}.pt")

    register_optimizer_step_pre_hook(keep)
    torch.nn.parallel.DistributedDataParallel = Recorded  # type: ignore[misc]
    sys.argv[1:2] = []
    import cli

    cli.main()


if __name__ == "__main__":
    main()
