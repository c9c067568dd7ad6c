"""The processes that make batches: started once, ended whatever happens to the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.util import Finalize
from typing import Any

import torch
from fsspec.asyn import reset_lock
from torch.utils.data import DataLoader, get_worker_info

from tec_cache.errors import TecCacheError
from tec_cache.labelled.making import Made, Maker, Wanted, generators_kept

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C and a scheduler signal every process of a job: the main one finishes its step, and needs its batches."""

LOOK_SECONDS = 1.0
"""Between two looks of a worker whether the main process is still there."""


class Workers(Iterator[Made]):
    """Makes batches ahead of use, in order. Made by `count` processes; without any, in this one, when asked.

    They are forked where the system can: a worker begins at once, and a transform need not be picklable.
    """

    def __init__(self, maker: Maker, wanted: Iterator[Wanted], count: int, *, pin_memory: bool) -> None:
        self._maker, self._wanted, self._pin_memory = maker, wanted, pin_memory
        self._batches: Any = None
        self._processes: list[Any] = []
        self.ended = False
        if count:
            kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
            context = multiprocessing.get_context(kind)
            self._stop = context.RawValue("b", 0)
            loader: DataLoader[Made] = DataLoader(
                replace(maker, stop=self._stop),  # type: ignore[arg-type]  # torch asks for no more than __getitem__
                batch_size=None,
                sampler=wanted,  # type: ignore[arg-type]
                num_workers=count,
                collate_fn=_as_it_is,
                pin_memory=pin_memory,
                worker_init_fn=_begin,
                multiprocessing_context=context,
                generator=torch.Generator(),  # or it would draw from the global one
            )
            # before multiprocessing, at the end of this process, asks them to end by a signal, and waits
            self._at_exit = Finalize(None, self._kill, exitpriority=0)
            with _signals_held():
                self._batches = iter(loader)
                self._processes = list(self._batches._workers)

    def __next__(self) -> Made:
        if self.ended:
            raise ValueError("the reader is closed")
        if self._batches is None:
            with generators_kept():
                made = self._maker[next(self._wanted)]
            pinned = made.batch.pin_memory() if made.batch is not None and self._pin_memory else made.batch
            return made._replace(batch=pinned)
        try:
            made = next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            todo = "it may have run out of memory: use fewer workers or smaller batches, or a larger /dev/shm"
            raise TecCacheError(f"a process that makes batches has ended: {error}", todo=todo) from error
        return made

    def end(self) -> None:
        """End all processes, and wait for them."""
        if self.ended:
            return
        self.ended = True
        if self._batches is not None:
            self._stop.value = 1
            try:
                self._batches._shutdown_workers()
            finally:
                self._batches = None
                self._kill()
                self._at_exit.cancel()

    def _kill(self) -> None:
        """Kill what is left: a worker hears no other signal."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()


def _as_it_is(made: Any) -> Any:
    return made


def _begin(number: int) -> None:
    """Make a process a worker: deaf to the signals of a job, with connections of its own, gone with the main one."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_main, daemon=True).start()
    info = get_worker_info()
    assert info is not None
    maker: Any = info.dataset
    reset_lock()  # fsspec's thread is not in a fork
    maker.index = maker.index.reopened()


def _end_with_main() -> None:
    """End this process once the main one is gone: torch looks only between two batches, and waits to hand them over."""
    main = multiprocessing.parent_process()
    while main is not None and os.getppid() == main.pid:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let the signals of a job wait, for this thread and for processes that begin in the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
