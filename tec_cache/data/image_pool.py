"""The threads that do stage one's image work, and the processes that do it for them once a job proves to be long.

Threads share one interpreter lock, and their image work holds it for longer than all else in stage one: with a process
beside each thread the main one holds it for less than a third of the time (docs/performance.md). A process costs half a
second of a core to start, so a small job starts none; both do the very same work (`image_work`), and no byte depends on
who did it.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType

import numpy as np
import numpy.typing as npt

from tec_cache.busy import TimedPool
from tec_cache.data.image_process import Bytes, ImageProcess
from tec_cache.data.image_work import Cutting, Seen, cut_photos, decode_crops
from tec_cache.data.photos import Photo

IMAGES_IN_THREADS = 2048
"""Images that are encoded or decoded before processes are started: a few seconds of a core."""


class Pixels:
    """Memory for decoded crops, (N, S, S, 3) uint8, which the processes of a pool can write to."""

    def __init__(self, file: Bytes, count: int, side: int) -> None:
        self.total = count * side * side * 3
        file.grow(self.total)
        self.array: npt.NDArray[np.uint8] = np.ndarray(
            (count, side, side, 3), np.uint8, mmap.mmap(file.handle, self.total)
        )


class ImagePool(TimedPool):
    """A pool of threads, each with a process that works for it where that pays.

    Tasks of several images, given from any thread. An error of a task is its future's; a process that is killed is a
    TecCacheError. `workers`: how many images are worked on at a time.
    """

    def __init__(self, workers: int, name: str = "photos") -> None:
        super().__init__(workers, name)
        self._left = IMAGES_IN_THREADS
        self._file = Bytes()
        self._own = threading.local()
        self._lock = threading.Lock()
        self._processes: list[ImageProcess] = []
        self._possible = True

    def pixels(self, count: int, side: int) -> Pixels:
        """Return memory for so many decoded crops; each call's lies in the same place, so one is in use at a time."""
        return Pixels(self._file, count, side)

    def cut(self, cutting: Cutting, photos: Sequence[Photo]) -> Future[list[Seen]]:
        """Hash photos and cut their views."""
        return self.submit(self._cut, cutting, photos)

    def decode(self, crops: Sequence[bytes], pixels: Pixels, first: int) -> Future[None]:
        """Decode stored crops to successive places from `first`."""
        return self.submit(self._decode, crops, pixels, first)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            for process in self._processes:
                process.leave()
            for process in self._processes:
                process.wait()
            self._file.close()

    def _cut(self, cutting: Cutting, photos: Sequence[Photo]) -> list[Seen]:
        # hashing alone does not need the interpreter
        process = self._process(len(photos) * (1 + len(cutting.numbers))) if cutting.numbers else None
        return cut_photos(cutting, photos) if process is None else process.cut(cutting, photos)

    def _decode(self, crops: Sequence[bytes], pixels: Pixels, first: int) -> None:
        process, side = self._process(len(crops)), pixels.array.shape[1]
        if process is None:
            decode_crops(crops, pixels.array[first : first + len(crops)])
        else:
            process.decode(crops, side, first * side * side * 3, pixels.total)

    def _process(self, images: int) -> ImageProcess | None:
        """Return this thread's process for so many images; None while the thread is to do them itself."""
        if self._left > 0 or not self._possible:
            self._left -= images  # about: no lock is worth it
            return None
        process: ImageProcess | None = getattr(self._own, "process", None)
        try:
            if process is None:
                process = self._own.process = ImageProcess(self._file)
                with self._lock:
                    self._processes.append(process)
            return process if process.ready else None
        except OSError:  # no more processes for this user, or no memory: threads do as well
            self._possible = False
            return None
