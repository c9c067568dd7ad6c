"""The list that gives names of classes their numbers: read from a file, or collected from all shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tec_cache.data.labels import Label, Labels
from tec_cache.data.tars import TarShard
from tec_cache.errors import ConfigError, LayoutError, SourceError, listed
from tec_cache.progress import Progress

LOOKED_AT = 1024
"""Photos of the first shard whose labels say whether labels are numbers or names."""
MOST_CLASSES = 100_000
"""Names that a class list may have, for it is in the identity of the cache. Captions are beyond it sooner or later."""
READERS = 8
"""Shards that are read at the same time for their names: to read labels is to wait."""


def read_classes(path: str) -> tuple[str, ...]:
    """Read a class list: a name on each line, or JSON (a list, or an object of name -> number or number -> name).

    Raises ConfigError.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise ConfigError(f"cannot read the classes: {error}", where=path, todo="give a list of names") from error
    names = _from_json(text, path) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or "" in names or twice:
        what = f"a class is named twice ({listed(twice)})" if any(twice) else "it has no name" if not names else ""
        raise ConfigError(what or f"class {names.index('')} has no name", where=path, todo="give each class one name")
    return tuple(names)


def _from_json(text: str, path: str) -> list[str]:
    """Read a list of names, or an object that gives each name its number or each number its name."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the classes are not JSON: {error}", where=path, todo="give a list of names") from error
    if isinstance(value, dict):
        pairs = [(number, name) for name, number in value.items()]
        if not all(type(number) is int for number, _ in pairs):
            pairs = [(int(number) if number.isdecimal() else -1, _name(name)) for number, name in value.items()]
        if sorted(number for number, _ in pairs) != list(range(len(pairs))):
            raise ConfigError("its numbers are not 0, 1, 2, ...", where=path, todo="number the classes from 0 on")
        value = [name for _, name in sorted(pairs)]
    if not all(isinstance(name, str) for name in value):
        raise ConfigError("its names are not strings", where=path, todo="give a list of names")
    return list(value)


def _name(value: Any) -> Any:
    """Return the name in ["n01440764", "tench"], the usual form of ImageNet's list; any other value as it is."""
    return value[0] if isinstance(value, list) and value else value


def find_labels(shards: Sequence[TarShard], field: str | None, *, quiet: bool) -> Labels:
    """Say where the labels of tars are and whether they are numbers or names; collect the names.

    The first photos decide, and what is of the other kind among the rest is a label that is not understood. KEY.txt
    counts only where no other label is found and all of them are whole numbers, as it holds captions more often.
    Names cost one reading of all shards (of plain local tars: of their headers and labels).
    """
    numbers = names = 0
    texts: list[Label] = []
    for label, text in islice(_labels(shards[0], Labels(field)), LOOKED_AT):
        numbers += isinstance(label.value, int)
        names += isinstance(label.value, str)
        if text is not None:
            texts.append(Labels("txt").read({"txt": text}))
    if field is None and not numbers and not names and texts and all(isinstance(t.value, int) for t in texts):
        return Labels("txt")
    if names <= numbers:
        return Labels(field)
    return Labels(field, collect(shards, field, quiet=quiet))


def collect(shards: Sequence[TarShard], field: str | None, *, quiet: bool) -> tuple[str, ...]:
    """Return the names of all labels, sorted."""
    found: set[str] = set()

    def names_of(shard: TarShard) -> set[str]:
        return {label.text for label, _ in _labels(shard, Labels(field)) if isinstance(label.value, str)}

    with (
        Progress("names of the classes", noun="shards", quiet=quiet) as progress,
        ThreadPoolExecutor(READERS, thread_name_prefix="labels") as pool,
    ):
        progress.expect(len(shards))
        for names in pool.map(names_of, shards):
            found |= names
            progress.advance(1)
            if len(found) > MOST_CLASSES:
                pool.shutdown(cancel_futures=True)
                raise LayoutError(
                    f"the labels have more than {MOST_CLASSES:,} names ({listed(sorted(found), 3)})",
                    where=shards[0].place,
                    todo="name the field that holds the class: --label-field NAME; or give the names: --classes FILE",
                )
    return tuple(sorted(found))


def _labels(shard: TarShard, labels: Labels) -> Iterator[tuple[Label, bytes | None]]:
    """Yield the labels of a shard, up to where it is damaged: whoever reads the photos will come to that."""
    try:
        yield from replace(shard, labels=labels).label_values()
    except SourceError:
        return
