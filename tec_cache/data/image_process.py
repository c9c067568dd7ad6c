"""A process that does image work for this one, beside its interpreter lock.

Images travel through memory without a name that both have open: photos one way and JPEGs back through a file of the
pair's own, decoded pixels through one that all processes of a pool share. Only short messages go through a socket. No
thread holds the interpreter while it copies or waits, nothing lies in /dev/shm, and nothing is left when both are gone.

The process leaves when its socket ends, however the other end came to that; signals that end a job are for the other
process alone. It imports neither torch nor timm, so that it starts in less than half a second of a core.
"""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection, Pipe
from multiprocessing.spawn import get_executable
from typing import Any

import numpy as np
import numpy.typing as npt

from tec_cache.data.image_work import Cutting, Seen, cut_photos, decode_crops
from tec_cache.data.photos import Photo
from tec_cache.data.views import CutPhoto
from tec_cache.errors import TecCacheError

KEPT_BYTES = 32 << 20
"""Of a pair's file, between two tasks: four photos and their crops take 1 MB, but one may have 64 MB."""
MOST_PIECES = 512
"""Buffers of one system call; POSIX promises 1,024 on what is in use."""
PATIENCE = 5.0
"""Seconds that a process has to leave once nobody needs it."""
NOT_ITS_OWN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that terminals and schedulers send to every process of a job."""

_START = "import sys; sys.path[:] = sys.argv[4:]; from tec_cache.data.image_process import work; work()"


class Bytes:
    """A file in memory, without a name: `put` on one side, `take` on the other."""

    def __init__(self, handle: int | None = None) -> None:
        self.handle = _anonymous() if handle is None else handle

    def put(self, pieces: Iterable[bytes]) -> list[int]:
        """Write pieces from the beginning; return their sizes."""
        every, at = list(pieces), 0
        for begin in range(0, len(every), MOST_PIECES):
            part = every[begin : begin + MOST_PIECES]
            wanted = sum(map(len, part))
            if os.pwritev(self.handle, part, at) != wanted:
                raise OSError(errno.ENOMEM, "no memory for images on their way between two processes")
            at += wanted
        return [len(piece) for piece in every]

    def take(self, sizes: Sequence[int]) -> list[bytes]:
        """Read the pieces that were put."""
        data = os.pread(self.handle, sum(sizes), 0)
        ends = list(accumulate(sizes, initial=0))
        if len(data) > KEPT_BYTES:
            os.ftruncate(self.handle, 0)
        return [data[begin:end] for begin, end in pairwise(ends)]

    def grow(self, size: int) -> None:
        """Make room for so many bytes, unless there is."""
        if os.fstat(self.handle).st_size < size:
            os.ftruncate(self.handle, size)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.handle)


class ImageProcess:
    """The other process, for one thread of this one. Raises OSError where none can be started."""

    def __init__(self, pixels: Bytes) -> None:
        self._bytes = Bytes()
        self._ready = False
        self._end, other = Pipe()
        handles = [other.fileno(), self._bytes.handle, pixels.handle]
        command = [get_executable() or "", "-c", _START, *map(str, handles), *sys.path]
        try:
            # its own start is too late to ignore them
            before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_ITS_OWN)
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=handles, env=_environment()
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:
            self._end.close()
            self._bytes.close()
            raise
        finally:
            other.close()

    @property
    def ready(self) -> bool:
        """Whether it has begun to listen. Raises OSError where it could not, TecCacheError where it was killed."""
        if not self._ready and self._end.poll():
            try:
                self._ready = bool(self._answer())
            except TecCacheError as error:
                if (self._process.returncode or 0) > 0:
                    raise OSError("no Python of its own, or not with these modules") from error
                raise
        return self._ready

    def cut(self, cutting: Cutting, photos: Sequence[Photo]) -> list[Seen]:
        """Let `cut_photos` be done there. Raises TecCacheError where the process ends meanwhile."""
        sizes = self._bytes.put(photo.data for photo in photos)
        about = [(photo.key, photo.problem) for photo in photos]
        told = self._ask(f"photos {photos[0].key!r} to {photos[-1].key!r}", "cut", cutting, about, sizes)
        jpegs = iter(self._bytes.take([size for _, sizes, *_ in told for size in sizes]))
        return [
            Seen(sha256, CutPhoto([next(jpegs) for _ in sizes], problem, note)) for sha256, sizes, problem, note in told
        ]

    def decode(self, crops: Sequence[bytes], side: int, place: int, total: int) -> None:
        """Let `decode_crops` be done there, to (B, side, side, 3) from byte `place` of `total` of the shared pixels."""
        self._ask("stored crops", "decode", self._bytes.put(crops), side, place, total)

    def leave(self) -> None:
        """Let the process leave."""
        self._end.close()

    def wait(self) -> None:
        """Wait until the process has left, a while, and see to it."""
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._bytes.close()

    def _ask(self, what: str, *message: Any) -> Any:
        try:
            self._end.send(message)
            return self._answer(what)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._gone(what) from error

    def _answer(self, what: str = "nothing yet") -> Any:
        try:
            result, error, text = self._end.recv()
        except (EOFError, ConnectionResetError) as gone:
            raise self._gone(what) from gone
        if error is not None:
            error.add_note(f"in a process that works on images:\n{text}")
            raise error
        return result

    def _gone(self, what: str) -> TecCacheError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        code = self._process.returncode
        how = f"killed by {_signal(-code)}" if code is not None and code < 0 else f"gone, with exit code {code}"
        return TecCacheError(
            f"a process that works on images was {how}",
            where=f"process {self._process.pid}, at work on {what}",
            todo="free some memory if the system ran out of it (fewer --workers), and run the same command again: "
            "it goes on with what is missing",
        )


def work() -> None:
    """Be that process: answer until nobody asks any more. Its arguments: the end of the socket, and two files."""
    end, own, pixels = Connection(int(sys.argv[1])), Bytes(int(sys.argv[2])), Bytes(int(sys.argv[3]))
    images = _Images(own, pixels)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other process is gone, or needs this no more
        end.send((True, None, ""))
        while True:
            name, *arguments = end.recv()
            try:
                end.send((getattr(images, name)(*arguments), None, ""))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                end.send((None, _picklable(error), traceback.format_exc()))


class _Images:
    """What a process is asked for."""

    def __init__(self, own: Bytes, pixels: Bytes) -> None:
        self._bytes, self._pixels = own, pixels
        self._memory: mmap.mmap | None = None

    def cut(
        self, cutting: Cutting, about: list[tuple[str, str]], sizes: list[int]
    ) -> list[tuple[bytes, list[int], str, str]]:
        """Cut photos; return (SHA-256, sizes of its JPEGs, problem, note) of each."""
        datas = self._bytes.take(sizes)
        photos = [Photo(key, data, None, problem) for (key, problem), data in zip(about, datas, strict=True)]
        every = cut_photos(cutting, photos)
        self._bytes.put(jpeg for seen in every for jpeg in seen.cut.jpegs)
        return [(sha256, [len(jpeg) for jpeg in cut.jpegs], cut.problem, cut.note) for sha256, cut in every]

    def decode(self, sizes: list[int], side: int, place: int, total: int) -> None:
        """Decode crops to their place in the shared pixels."""
        if self._memory is None or len(self._memory) < total:
            self._memory = mmap.mmap(self._pixels.handle, total)
        shape = (len(sizes), side, side, 3)
        out: npt.NDArray[np.uint8] = np.ndarray(shape, np.uint8, self._memory, place)
        decode_crops(self._bytes.take(sizes), out)


def _anonymous() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tec-cache")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _environment() -> dict[str, str]:
    """Return this process's, but for threads of numpy's matrix products, of which there are none."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
