"""What a report is about: each place, what it is, and its letter on the page."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.describing.info_export import describe_export
from pipelines.describing.info_rounds import describe_rounds
from pipelines.describing.info_run import describe_run
from pipelines.info import describe_cache
from pipelines.reporting.html import Html, problem, shortened
from tec_cache.errors import ConfigError, TecCacheError, listed
from tec_cache.kinds import RUN_FILE, Kind, contents, what_is
from tec_cache.printable import counted
from tec_cache.urls import scrubbed, without_secrets


@dataclass(frozen=True)
class Subject:
    """A run, a cache or pack, or an export."""

    letter: str
    number: int
    """Of the letter, from 0."""
    place: str
    kind: Kind
    about: dict[str, Any] | None
    """As `tec-cache info --json` says it; None where it cannot be read."""
    error: TecCacheError | None = None

    @property
    def folder(self) -> Path:
        """Its folder on this machine; of runs and exports alone."""
        return Path(self.place.removeprefix("file://"))

    @property
    def name(self) -> str:
        """The last part of its place, which says most."""
        shown = without_secrets(self.place).rstrip("/")
        return shown.rpartition("/")[2] or shown

    @property
    def title(self) -> str:
        """Letter and name."""
        return f"{self.letter} · {self.name}"

    @property
    def task(self) -> str | None:
        """Of a run or an export that can be read."""
        return None if self.about is None else self.about.get("task")


def letter_of(number: int) -> str:
    """Return A, B, ..., Z, AA, AB, ..."""
    more, last = divmod(number, 26)
    return (letter_of(more - 1) if more else "") + string.ascii_uppercase[last]


def open_subjects(places: Sequence[str]) -> list[Subject]:
    """Look at every place. What is damaged stays, with its error.

    Raises ConfigError for a place with nothing of this program's, and where there are none.
    """
    if not places:
        raise ConfigError("no place was named", todo="tec-cache report RUN --out report.html")
    places = [single for place in places for single in _singles(place)]
    names = [without_secrets(place) for place in places]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"places were given twice, {listed(twice)}", todo="give each once")
    return [_opened(number, place) for number, place in enumerate(places)]


def _singles(place: str) -> list[str]:
    """Return the runs of a folder of rounds; any other place as it is. Raises TecCacheError for a damaged one."""
    if what_is(place) is not Kind.ROUNDS:
        return [place]
    folder = Path(place.removeprefix("file://"))
    runs = [folder / one["run"] for one in describe_rounds(folder)["rounds"]]
    return [str(run) for run in runs if (run / RUN_FILE).is_file()]


def _opened(number: int, place: str) -> Subject:
    kind = what_is(place)
    if kind in (Kind.NOTHING, Kind.OTHER):
        folder = Path(place.removeprefix("file://"))
        what = "nothing lies here" if kind is Kind.NOTHING else f"nothing to report on, but {contents(folder)}"
        todo = "give the folder of a run (train, finetune or segment --out), a cache, a pack, an export, or rounds"
        raise ConfigError(what, where=place, todo=todo)
    folder = Path(place.removeprefix("file://"))
    describe: dict[Kind, Callable[[], dict[str, Any]]] = {
        Kind.RUN: lambda: describe_run(folder),
        Kind.EXPORT: lambda: describe_export(folder),
    }
    about, error = None, None
    try:
        about = describe.get(kind, lambda: describe_cache(place))()
    except TecCacheError as failed:
        error = failed
    return Subject(letter_of(number), number, place, kind, about, error)


def guarded(make: Callable[[], Html], what: str, problems: list[str]) -> Html:
    """Make a part of the page; where that fails, say so in its place, and in `problems`.

    What was damaged on a disk can fail in many ways once it is computed with; the rest of the page stays.
    """
    try:
        return make()
    except TecCacheError as error:
        problems.append(f"{what}: {shortened(error.what)}")
        return problem(error)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ArithmeticError, ImportError) as error:
        first = scrubbed(str(error)).partition("\n")[0] or "no message"
        problems.append(f"{what}: {type(error).__name__}: {first}")
        return problem(f"{what} cannot be shown: {type(error).__name__}: {first}")


def state(subject: Subject) -> str:
    """Say in a few words how far it is."""
    about = subject.about
    if about is None:
        return "cannot be read"
    if subject.kind is Kind.RUN:
        total = about["total_steps"]
        done = f"step {about['step']:,} of {total:,}"
        begun = about["step"] or about["logged"]
        return (
            f"finished, {counted(total, 'step')}"
            if about["finished"]
            else f"{done}, not finished"
            if begun
            else "just begun"
        )
    if subject.kind is Kind.EXPORT:
        return f"step {about['step']:,} of {about['run']}"
    if about["unread_shards"] or about["missing_units"] or any(t["missing_units"] for t in about["targets"].values()):
        return "not finished"
    return "whole"
