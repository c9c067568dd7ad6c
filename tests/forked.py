"""Jobs in processes of their own that begin without importing anything: forked from one that has it all in memory.

It has no threads and has touched no network, so that its copies are as good as fresh processes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_USED = ["pipelines.extract", "tests.conftest", "tests.faults", "s3fs", "simplejpeg"]
# these are imported where they are used, which every copy would do anew
_USED += ["zarr.codecs", "zarr.storage", "numcodecs.blosc", "tec_cache.codec.fit", "tec_cache.codec.transform"]
_CONTEXT.set_forkserver_preload(_USED)


def start(function: Callable[..., object], *args: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Start `function(*args)` in a process of its own; it must be importable by name."""
    process: ForkServerProcess = _CONTEXT.Process(target=_run, args=(function, args, dict(environment or {})))
    process.start()
    return process


def barrier(parties: int) -> Any:
    """Return a barrier for several such jobs."""
    return _CONTEXT.Barrier(parties)


def _run(function: Callable[..., object], args: tuple[Any, ...], environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)
