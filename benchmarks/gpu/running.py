"""Parts run one after the other, each in a process of its own, until a command's time is over."""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu.data import Data
from benchmarks.gpu.parts import Part
from benchmarks.gpu.results import Results

Say = Callable[[str], object]

LAST_SECONDS = 20.0
"""In which a part that has said what it found may put its things away."""


def run_parts(parts: list[Part], data: Data, results: Results, deadline: float, say: Say) -> list[str]:
    """Run parts one after the other up to a moment of the monotonic clock; return the names of those that are left."""
    left = []
    for number, part in enumerate(parts):
        if number and time.monotonic() + 60 * part.minutes > deadline:
            left.append(part.name)
            continue
        say(f"{part.name}: {part.question}")
        begin = time.monotonic()
        found = in_a_process(part, data, max(deadline - begin, 1.0))
        if found is None and number:
            say("  cut off by the end of this command")
            left.append(part.name)
            continue
        result = found or {"failed": f"it does not end within {deadline - begin:.0f} s"}
        how = {"question": part.question, "command": shlex.join(["python", *sys.orig_argv[1:]])}
        results.add(part.name, how | {"seconds": time.monotonic() - begin} | result)
        say(f"  failed: {result['failed']}" if "failed" in result else f"  {time.monotonic() - begin:.0f} s")
    return left


def in_a_process(part: Part, data: Data, seconds: float) -> dict[str, Any] | None:
    """Run a part; return its rows or how it failed, None where it took longer than `seconds` and was ended.

    A process of its own gives all memory back, and takes no other part with it when a driver aborts it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it, before torch is loaded
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu.parts"])  # imports torch and timm once for all parts
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, part, data))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return None
        found: dict[str, Any] = ours.recv()
        process.join(LAST_SECONDS)
        return found
    except EOFError:
        process.join()
        return {"failed": f"its process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _run(pipe: Connection, part: Part, data: Data) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not data.size.compiles:
        torch.compiler.set_stance("force_eager")
    try:
        pipe.send({"rows": part.work(data)})
    except Exception as error:
        traceback.print_exc()
        pipe.send({"failed": f"{type(error).__name__}: {error}"})


def _end_with_parent() -> None:
    """End this process where the command that began it has been killed: nobody would hear what it finds."""
    command = parent_process()
    assert command is not None
    command.join()
    os._exit(1)
