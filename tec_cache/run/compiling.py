"""torch.compile for a student: in place, kernels of each process apart, errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tec_cache.distributed import Ranks
from tec_cache.errors import TecCacheError


def compile_in_place(model: nn.Module, ranks: Ranks) -> None:
    """Let torch.compile make the kernels of a model at its first step; the names of its weights stay.

    It is the model that is compiled, not what DistributedDataParallel makes of it. Dynamo sees that wrapper at work
    around it, and cuts the graph where the wrapper's buckets end: gradients travel beside the backward pass, with and
    without --checkpointing (torch before 2.6, the lowest that is supported, refuses that).
    """
    if ranks.local_world_size > 1:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes two seconds

        # two processes that compile the same C++ code at once load each other's unfinished libraries
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache_dir()}/rank{ranks.local_rank}"
    model.compile()


@contextmanager
def explained_compiling() -> Iterator[None]:
    """Say what to do where torch.compile fails, which it does at the first step, forward or backward."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        first = str(error).strip().partition("\n")[0]
        raise TecCacheError(f"the student cannot be compiled here: {first}", todo="leave out --compile") from error
