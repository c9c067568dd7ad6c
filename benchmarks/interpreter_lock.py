"""For how long the threads of this process hold the interpreter lock: clocks around the calls that give and take it.

`with_clocks` compiles them (a C compiler is needed) and begins this program again with them in front of libpython,
which must be a shared library. What is counted is CPU time, so that other work on the machine does not disturb it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
_MOST = 65_536
_VARIABLE = "TEC_CACHE_LOCK_CLOCKS"


class _Held(ctypes.Structure):
    _fields_ = (("thread", ctypes.c_long), ("seconds", ctypes.c_double))


def with_clocks() -> None:
    """Begin this program again with the clocks, unless they are there. Ends the program where they cannot be."""
    if _VARIABLE in os.environ:
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        raise SystemExit("clocks around the interpreter lock need Linux and a C compiler")
    library = Path(tempfile.mkdtemp()) / "clocks.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", str(SOURCE), "-o", str(library), "-ldl"], check=True)
    changes = {_VARIABLE: str(library), "LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | changes)


class LockClocks:
    """Reads the clocks; made before the threads of which it is to know the names."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ[_VARIABLE])
        self._names = {threading.get_native_id(): "main"}
        threading.setprofile(self._named)
        os.remove(os.environ[_VARIABLE])
        os.environ.pop("LD_PRELOAD")  # not for the processes that this one starts
        if not self.seconds():
            raise SystemExit("the clocks are not asked: this Python's libpython is no shared library")

    def _named(self, *_: object) -> None:
        """Note the name of a thread as it begins."""
        name = threading.current_thread().name
        self._names[threading.get_native_id()] = name.rpartition("_")[0] or name
        sys.setprofile(None)

    def seconds(self) -> Counter[str]:
        """Return the CPU seconds for which the lock was held so far, by name of the threads."""
        held: Any = (_Held * _MOST)()
        result: Counter[str] = Counter()
        for entry in held[: self._library.held_by_threads(held, _MOST)]:
            result[self._names.get(entry.thread, "other")] += entry.seconds  # type: ignore[assignment]
        return result
