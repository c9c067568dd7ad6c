"""The command line in several processes, as people type it: torchrun, its ranks, and what they said."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPTS = Path(sys.executable).parent
TIMEOUT = 240.0
"""Seconds after which something hangs. No test waits so long where nothing does."""
LAUNCH = ("--standalone",)
"""Options of torchrun: any free port, because tests run side by side."""


def environment() -> dict[str, str]:
    """The shell of somebody who has activated the environment; without the warning that torchrun sets one thread."""
    return os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def options(config: Any) -> list[str]:
    """Write a config as words of the command line."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "input":
            words += [] if value is None else [value]
        elif field.name in ("student_args", "base_args"):
            for name, given in value.items():
                words += [f"--{field.name.removesuffix('s').replace('_', '-')}", f"{name}={given}"]
        elif value is True:
            words.append(f"--{field.name.replace('_', '-')}")
        elif field.type == "tuple[str, ...]":
            words += [word for given in value for word in (f"--{field.name.replace('_', '-')}", given)]
        elif value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return words


def children(parent: int) -> dict[int, dict[str, str]]:
    """Processes that a process has started, and their environments."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{parent}\n" in (folder / "status").read_text():
                words = (folder / "environ").read_bytes().decode().split("\0")
                found[int(folder.name)] = dict(word.split("=", 1) for word in words if "=" in word)
        except OSError:
            continue  # it has just ended
    return found


class Job:
    """A torchrun in the background; `with` ends it, and its ranks, whatever happens."""

    def __init__(self, folder: Path, processes: int, *command: str, launch: tuple[str, ...] = LAUNCH) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out_file, self.err_file = folder / "stdout", folder / "stderr"
        words = ["torchrun", *launch, "--nproc-per-node", str(processes), *command]
        with self.out_file.open("wb") as out, self.err_file.open("wb") as err:
            self.process = subprocess.Popen(words, stdout=out, stderr=err, env=environment(), start_new_session=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *self.ranks().values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def out(self) -> str:
        return self.out_file.read_text()

    @property
    def err(self) -> str:
        return self.err_file.read_text()

    def ranks(self, restart: int | None = None) -> dict[int, int]:
        """Process ids of the ranks that live; of one start only, where that is given (0 is the first)."""
        return {
            int(values["RANK"]): pid
            for pid, values in children(self.process.pid).items()
            if "RANK" in values and restart in (None, int(values.get("TORCHELASTIC_RESTART_COUNT", -1)))
        }

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.err}"
            assert time.monotonic() < end, f"waited in vain until {what}:\n{self.err}"
            time.sleep(0.01)

    def end(self) -> int:
        """Wait for its end; return the exit code."""
        return self.process.wait(TIMEOUT)


def torchrun(folder: Path, processes: int, *command: str, launch: tuple[str, ...] = LAUNCH) -> Job:
    """Run to the end; the exit code is `process.returncode`."""
    with Job(folder, processes, *command, launch=launch) as job:
        job.end()
        return job
