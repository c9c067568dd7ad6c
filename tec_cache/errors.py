"""Errors a user can act on: what went wrong, where, and what to do about it.

Every one of them is a `TecCacheError`; the command line prints its three lines and exits with
its code. Anything else that escapes is a bug of ours and shows a traceback under `--debug`.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from tec_cache.printable import block
from tec_cache.urls import scrubbed, without_secrets


class TecCacheError(Exception):
    """What went wrong (`what`), where (`where`: a file, a unit, an option) and the remedy (`todo`).

    details: lines below `what`, such as a list of fields. command: what to type, on a line of its own below `todo`.
    Each part is a single line: line breaks, for instance in a name, are escaped, so write none into a part.
    Credentials in URLs are left out of every part, because messages end up in logs.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str = "", todo: str = "", details: Iterable[str] = (), command: str = ""
    ) -> None:
        what, where, todo = scrubbed(what), without_secrets(where), scrubbed(todo)
        details = [scrubbed(line) for line in details]
        self.what, self.where, self.todo = what, where, todo
        self.details, self.command = tuple(details), command
        lines = [what, *(f"    {line}" for line in self.details)]
        if where:
            lines.append(f"  where: {where}")
        if todo:
            lines.append(f"  to do: {todo}")
        if command:
            lines.append(f"    {command}")
        super().__init__(block(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parts: an error of a worker process reaches the main one as it was raised."""
        return _again, (type(self), self.what, self.where, self.todo, self.details, self.command)


def _again(
    kind: type[TecCacheError], what: str, where: str, todo: str, details: tuple[str, ...], command: str
) -> TecCacheError:
    return kind(what, where=where, todo=todo, details=details, command=command)


class ConfigError(TecCacheError, ValueError):
    """A setting that cannot be meant: exit code 2."""

    exit_code = 2


class WeightsError(TecCacheError):
    """A weight file that does not fit the model it is meant for."""


class SourceError(TecCacheError):
    """Photos that cannot be read: a broken image, a damaged shard."""


class LayoutError(TecCacheError):
    """Photos that lie so that they, or their labels, would be read wrongly: never left out as damage is."""


class IdentityError(ConfigError):
    """A cache or run was made with other settings; names every field that differs."""


class CacheError(TecCacheError):
    """The cache is incomplete or corrupt: exit code 3."""

    exit_code = 3


GO_ON = "what is committed stays valid, the same command goes on"
"""How a StorageError's remedy ends; the command line prints the command after it."""


class StorageError(TecCacheError):
    """A disk or store that is full, read-only or gone."""


class NonFiniteError(TecCacheError):
    """A NaN or an infinity where a number was expected."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean A, B?)' for the known words nearest to `word`, or an empty string."""
    close = get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return '12: a, b, ... and 4 more', at most `most` of the names."""
    every = list(names)
    more = f", ... and {len(every) - most} more" if len(every) > most else ""
    return f"{len(every)}: {', '.join(every[:most])}{more}"
