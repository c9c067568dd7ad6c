"""Standard output and error that take everything: whoever reads them may leave, and may know ASCII only.

What cannot be printed never stops the work. That a result could not be printed is remembered, for the exit code.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Tolerant(io.FileIO):
    """A file descriptor to which writing never fails; why it did is kept."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write, or remember why that is impossible."""
        try:
            while (written := super().write(data)) is None:  # a full pipe that does not block
                select.select([], [self], [])
            return written
        except OSError as error:  # a closed pipe, a terminal that is gone, a full disk
            self.lost = error
            return memoryview(data).nbytes


def open_missing() -> None:
    """Open the null device in place of each standard stream that the caller closed.

    Otherwise the first file that is opened takes its number, and what a library writes to standard error goes into
    that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(opened, True)


def make_tolerant() -> None:
    """Let `sys.stdout` and `sys.stderr` take everything; streams that a caller has put in their place stay."""
    if sys.stdout is sys.__stdout__:
        sys.stdout = _tolerant(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _tolerant(2, sys.stderr)


def _tolerant(number: int, stream: Any) -> io.TextIOWrapper:
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Tolerant(number, "wb", closefd=False)),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


def lost_output() -> OSError | None:
    """Return why not all of the standard output could be written, None where it was."""
    sys.stdout.flush()
    sys.stderr.flush()
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)


def reader_left(error: OSError) -> bool:
    """Say whether whoever read the output has seen enough, as `head` does; that needs no message."""
    return error.errno == errno.EPIPE
