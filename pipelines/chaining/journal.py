"""FOLDER/rounds.json: with what settings the rounds were begun, which calls are done, and what came of each round.

It is written after every call. A call that was finished but not written down, because of a kill between the two, is
made again, and each of them then finds that there is nothing left to do.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tec_cache.cache.layout import LOCK
from tec_cache.documents import read_document
from tec_cache.errors import TecCacheError, listed
from tec_cache.kinds import ROUNDS_FILE as FILE
from tec_cache.store.files import drafts_of, write_atomically

FORMAT = 1
_DRAFT = drafts_of(re.escape(FILE))


@dataclass
class Round:
    """What came of one round."""

    number: int
    run: str
    export: str
    """Folders, relative to the one of all rounds."""
    target: str | None
    """The set of the round before's model, which it learned from; None for round 0."""
    removed: bool = False
    """Whether that set is gone again."""
    base_calls: int = 0
    """How many views the round before's model looked at to make it: each row once, and the codec's sample."""
    target_bytes: int = 0
    """Of its payloads."""
    steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """In the last line of the run's metrics.jsonl."""
    scores: dict[str, float] = field(default_factory=dict)
    """Of the last judgement (--probe-every): probe_knn and probe_linear, 0 to 1, and its step."""
    init: dict[str, Any] | None = None
    """What was taken of the round before's run (--start previous)."""
    export_bytes: int = 0
    hours: dict[str, float] = field(default_factory=dict)
    """Of "extract" and "train", of all calls that could still write them down: what a kill ended is not in them."""


@dataclass
class Journal:
    """What is written down."""

    folder: Path
    settings: dict[str, Any]
    done: list[str] = field(default_factory=list)
    """Calls, in their order, as "round-01 train"."""
    sets: list[str] = field(default_factory=list)
    """Target sets that these rounds have begun to make."""
    rounds: list[Round] = field(default_factory=list)

    def save(self) -> None:
        """Write it, in place of what is there."""
        said = {"format": FORMAT, "settings": self.settings, "done": self.done, "sets": self.sets}
        data = said | {"rounds": [asdict(one) for one in self.rounds]}
        write_atomically(self.folder / FILE, json.dumps(data, indent=2).encode() + b"\n")

    def finished(self, call: str) -> None:
        """Write down that a call is done."""
        self.done.append(call)
        self.save()

    @contextmanager
    def timed(self, one: Round, what: str) -> Iterator[None]:
        """Add the hours of the block to a round's, however it ends."""
        begin = time.monotonic()
        try:
            yield
        finally:
            one.hours[what] = one.hours.get(what, 0.0) + (time.monotonic() - begin) / 3600
            self.save()


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    """The whole of rounds.json."""

    format: int
    settings: dict[str, Any]
    done: list[str]
    sets: list[str]
    rounds: list[Round]


def read_journal(folder: Path) -> Journal | None:
    """Return what a folder of rounds says; None where there is nothing in it yet.

    Raises TecCacheError where something else lies there, or it cannot be understood.
    """
    path = folder / FILE
    if not path.exists():
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        others = [name for name in names if name != LOCK and not _DRAFT.fullmatch(name)]
        if others or (folder.exists() and not folder.is_dir()):
            raise TecCacheError(
                f"this folder holds something else than rounds of tec-cache: {listed(others)}",
                where=str(folder),
                todo="name another --out; what lies here can only be removed by you",
            )
        return None
    found = read_document(path)
    if found.get("format") != FORMAT:
        todo = "go on with the version of tec-cache that made it, or give another --out"
        what = f"these rounds are of format {found.get('format')!s:.20}, this program's are of {FORMAT}"
        raise TecCacheError(what, where=str(path), todo=todo)
    try:
        read = msgspec.convert(found, _Document)
    except msgspec.ValidationError as error:
        raise TecCacheError(
            f"{FILE} is damaged: {error}", where=str(path), todo="put back a copy of it, or give another --out"
        ) from error
    return Journal(folder, read.settings, read.done, read.sets, read.rounds)


def clear_drafts(folder: Path) -> None:
    """Remove what kills left of rounds.json."""
    for path in folder.iterdir():
        if _DRAFT.fullmatch(path.name):
            path.unlink()
