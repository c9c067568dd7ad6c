"""Ctrl-C and the signals of schedulers, from the first line of the program to its last: never a traceback.

There are three times. Until a command begins, and while anything is being imported, the process ends at once: nothing
is half done that a kill would not leave as well. While a command works, the first signal raises KeyboardInterrupt, so
that what is at hand is finished and drafts are removed; a second Ctrl-C does not wait. When the work is done, its
exit code stands.

This module is imported before everything else, so it imports next to nothing.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys

TYPE_CHECKING = False  # typing itself takes as long as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, NoReturn

EXIT_INTERRUPTED = 130

TIME_LIMIT = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before a job's time is up."""

SHOW_CURSOR = b"\x1b[?25h"
"""A progress bar hides it."""

_state: dict[str, Any] = {"program": False, "keys": (), "last_words": lambda: _before_anything()}


def is_program(name: str) -> bool:
    """Say whether this process is tec-cache itself, not a program that imports its code. name: a `__name__`."""
    return name == "__main__" or os.path.basename(sys.argv[0]).removesuffix(".exe") == "tec-cache"


def begin() -> None:
    """From now on a signal ends the process at once, with one line and exit code 130.

    Ctrl-C stays ignored where the caller ignores it: a shell does for what it starts in the background.
    """
    _state["program"] = True
    _state["keys"] = () if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else (signal.SIGINT,)
    _on_signal((*_state["keys"], *TIME_LIMIT), end_now)
    # the first to be registered is the last to be called: behind it Python gives each handler up for the default
    # action, which is to die of the signal, but leaves an ignored one alone
    atexit.register(_on_signal, (signal.SIGINT, *TIME_LIMIT), signal.SIG_IGN)


def working(last_words: Callable[[], tuple[int, str]]) -> None:
    """From now on the first signal raises KeyboardInterrupt, unless something is being imported just then.

    last_words: file descriptor and text of what is said where the process ends at once. In a process that only
    imports this program, Ctrl-C stays that process's own.
    """
    _on_signal(TIME_LIMIT, interrupt)
    if _state["program"]:
        _state["last_words"] = last_words
        _on_signal(_state["keys"], interrupt)
        sys.unraisablehook = _unraisable


def done(code: int) -> None:
    """From now on a signal ends the process at once, with the exit code of its finished work."""
    if _state["program"]:
        _on_signal((*_state["keys"], *TIME_LIMIT), lambda *_: os._exit(code))


def interrupt(number: int, frame: FrameType | None) -> None:
    """End like Ctrl-C: what is finished is kept, and the command that goes on is printed.

    Once: a scheduler signals every process of a job, and torchrun passes on its own, while this one is on its way out.
    """
    _on_signal(TIME_LIMIT, signal.SIG_IGN)
    if _state["program"]:
        if _importing(frame):
            end_now()
        _on_signal(_state["keys"], end_now)
    raise KeyboardInterrupt


def end_now(*_: object) -> NoReturn:
    """Say the last words and end, without a word from anybody else; safe in a signal handler."""
    try:
        _on_signal((signal.SIGINT, *TIME_LIMIT), signal.SIG_IGN)
        descriptor, text = _state["last_words"]()
        if os.isatty(2):
            os.write(2, SHOW_CURSOR)
        # not by print: the signal may have come in the middle of one
        os.write(descriptor, text.encode("ascii", "backslashreplace"))
    finally:
        os._exit(EXIT_INTERRUPTED)


def _before_anything() -> tuple[int, str]:
    """Return what is said before the program is loaded."""
    if os.environ.get("RANK", "0") != "0":
        return 2, ""
    what = "interrupted before anything was begun"
    if "--json" in sys.argv[1:]:
        error = f'{{"what": "{what}", "where": "", "todo": "", "exit_code": {EXIT_INTERRUPTED}}}'
        return 1, f'{{"error": {error}}}\n'
    return 2, f"error: {what}\n"


def _on_signal(numbers: tuple[signal.Signals, ...], handler: Any) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _importing(frame: FrameType | None) -> bool:
    """Say whether a frame belongs to an import: many modules turn a KeyboardInterrupt into something else."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _unraisable(event: Any) -> None:
    """End at once where a KeyboardInterrupt came in the middle of a destructor, and would be lost."""
    if isinstance(event.exc_value, KeyboardInterrupt):
        end_now()
    sys.__unraisablehook__(event)
