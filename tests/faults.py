"""Every step that an extraction does on the disk, told before it is done: to be killed there, or to be refused.

Steps are what the operating system is asked for: opening a file for writing, syncing, renaming, linking, removing,
making a folder. Python's audit events report them whichever library asks.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pipelines.extract
import pipelines.extraction.fit
import pipelines.extraction.make_targets
import pipelines.extraction.make_views
import tec_cache.cache.remove
import tec_cache.data.image_work
from tec_cache.store.local import LocalStore

_EVENTS = {"os.rename": "rename", "os.link": "link", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}

PHASES = {
    (pipelines.extract, "prepare_cache"): "preparing",
    (pipelines.extract, "prepare_targets"): "preparing",
    (pipelines.extract, "ensure_codec"): "fit",
    (tec_cache.data.image_work, "cut_photo"): "views cut",
    (pipelines.extraction.make_views, "commit_views"): "views draft",
    (pipelines.extraction.make_targets, "targets_of"): "targets compute",
    (pipelines.extraction.make_targets, "commit_targets"): "targets draft",
    (pipelines.extract, "describe"): "summary",
    (tec_cache.cache.remove, "clear_leftovers"): "clearing up",
}
"""Functions of stage one by what they do; within them `put` and `create` are told by the file's name."""


class Step(NamedTuple):
    """One request to the operating system."""

    phase: str
    action: str
    path: str
    source: str = ""
    """What is renamed or linked."""
    thread: int = 0


def kind_of(name: str) -> str:
    """Say what a file of a cache is."""
    folder, file = name.split("/")[0], name.rpartition("/")[2]
    if folder == "records":
        return f"{name.split('/')[1].removesuffix('.json')} record"
    if file.startswith("codec"):
        return "codec record" if file.endswith(".json") else "codec payload"
    return file if file.endswith(".json") else f"{folder} payload"


class Watch:
    """Tells `step` of every step below a folder, and `enter` of every phase, for the rest of this process's life.

    Stages work at the same time, each in a thread of its own: a phase is one thread's.
    """

    def __init__(
        self,
        folder: Path,
        step: Callable[[Step], None] = lambda step: None,
        enter: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.root, self.step, self.enter = f"{folder}{os.sep}", step, enter
        self.threads: dict[int, list[str]] = {}
        for (module, name), phase in PHASES.items():
            setattr(module, name, self._within(getattr(module, name), lambda *args, phase=phase: phase))
        for name, which in (("put", 2), ("create", 1)):
            setattr(LocalStore, name, self._within(getattr(LocalStore, name), lambda *a, w=which: kind_of(a[w])))
        fsync = os.fsync

        def told(handle: int) -> None:
            self._tell("sync", os.readlink(f"/proc/self/fd/{handle}"))
            fsync(handle)

        os.fsync = told
        sys.addaudithook(self._audit)

    @property
    def phases(self) -> list[str]:
        """The phases that this thread is in."""
        return self.threads.setdefault(threading.get_ident(), ["start"])

    def _within(self, function: Callable[..., Any], phase: Callable[..., str]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.phases.append(phase(*args))
            self.enter(self.phases[-1])
            try:
                return function(*args, **kwargs)
            finally:
                self.phases.pop()
                if len(self.phases) > 1:
                    self.enter(self.phases[-1])

        return call

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self._tell("open", args[0])
        elif event in ("os.rename", "os.link"):
            self._tell(_EVENTS[event], os.fspath(args[1]), os.fspath(args[0]))
        elif event in _EVENTS:
            # the standard library empties folders by names relative to a handle: args[-1]
            relative = event != "os.mkdir" and args[-1] not in (-1, None)
            self._tell(_EVENTS[event], self.root + ".drafts/?" if relative else os.fspath(args[0]))

    def _tell(self, action: str, path: str, source: str = "") -> None:
        if path.startswith(self.root) or path + os.sep == self.root:
            name = path.removeprefix(self.root)
            if name != ".lock":
                thread = threading.get_ident()
                self.step(Step(self.phases[-1], action, name, source.removeprefix(self.root), thread))


@contextmanager
def refused(error: OSError, folder: Path, when: Callable[[Step], bool]) -> Iterator[None]:
    """Let the operating system refuse the steps that `when` chooses; for a forked process, as `Watch` is."""

    def step(step: Step) -> None:
        if when(step):
            raise error

    watch = Watch(folder, step)
    try:
        yield
    finally:
        watch.step = lambda step: None
