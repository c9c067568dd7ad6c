"""The list that gives names of classes their numbers: read from a file, or collected from all shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import islice
from pathlib import Path
from typing import Any

from tec_cache.data.labels import Label, Labels, json_fields
from tec_cache.data.photos import Shard
from tec_cache.errors import ConfigError, LayoutError, SourceError, listed
from tec_cache.progress import Progress

LOOKED_AT = 1024
"""Photos of the first shard whose labels say whether labels are numbers or names."""
MOST_FIELDS = 100
"""Names of fields that are remembered for people."""
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
            pairs = [(_number(number), _name(name)) for number, name in value.items()]
        if sorted(number for number, _ in pairs) != list(range(len(pairs))):
            raise ConfigError("its numbers are not 0, 1, 2, ...", where=path, todo="number the classes from 0 on")
        value = [name for _, name in sorted(pairs)]
    if not all(isinstance(name, str) for name in value):
        raise ConfigError("its names are not strings", where=path, todo="give a list of names")
    return list(value)


def _number(text: str) -> int:
    """Read the number of a class; -1 for any other text, and for more digits than Python reads."""
    return int(text) if text.isdecimal() and len(text) < 20 else -1


def _name(value: Any) -> Any:
    """Return the name in ["n01440764", "tench"], the usual form of ImageNet's list; any other value as it is."""
    return value[0] if isinstance(value, list) and value else value


@dataclass
class LabelsSeen:
    """What a look at the first photos of a shard told."""

    numbers: int = 0
    names: int = 0
    texts: int = 0
    """Photos with a KEY.txt."""
    number_texts: int = 0
    """Those of them that hold a whole number and nothing more."""
    fields: set[str] = dataclass_field(default_factory=set)
    """Fields beside the image, and those of JSON documents as json:NAME."""

    @classmethod
    def of(cls, shard: Shard, field: str | None) -> LabelsSeen:
        """Look at the first photos of a shard."""
        seen = cls()
        for label, fields in islice(_labels(shard, Labels(field)), LOOKED_AT):
            seen.numbers += isinstance(label.value, int)
            seen.names += isinstance(label.value, str)
            seen.texts += "txt" in fields
            seen.number_texts += isinstance(Labels("txt").read(fields).value, int) if "txt" in fields else 0
            if len(seen.fields) < MOST_FIELDS:
                seen.fields.update(name for name in fields if name != "json")
                seen.fields.update(f"json:{name}" for name in json_fields(fields.get("json", b"{}")))
        return seen

    @property
    def any(self) -> bool:
        """Whether any photo has a label."""
        return bool(self.numbers or self.names)


def find_labels(shards: Sequence[Shard], field: str | None, *, quiet: bool) -> tuple[Labels, str]:
    """Say where the labels of some shards are and whether they are numbers or names; collect the names.

    Returns them and a remark for people. Names that the first whole shard says beside its photos are the classes of
    all. Else the first photos decide (of the first shard; where they have no labels, of one in the middle and of the
    last), and what is of the other kind among the rest is a label that is not understood. KEY.txt counts only where no
    other label is found and all of them are whole numbers: it holds captions more often. Names cost one reading of all
    shards (of plain local tars: of their headers and labels; of parquet files: of one column).
    """
    names = next(_declared(shards, Labels(field)), None)
    if names is not None:
        return Labels(field, names), ""
    seen = LabelsSeen()
    for number in sorted({0, len(shards) // 2, len(shards) - 1}):
        seen = LabelsSeen.of(shards[number], field)
        if seen.any or (field is None and seen.texts):
            break
    if field is None and not seen.any and 0 < seen.texts == seen.number_texts:
        return Labels("txt"), "labels were found in KEY.txt: all that was looked at is whole numbers"
    if seen.names > seen.numbers:
        return Labels(field, collect(shards, field, quiet=quiet)), ""
    if seen.any:
        return Labels(field), ""
    remark = f"no label was found: looked for {shards[0].looked_for(Labels(field))}"
    if seen.fields:
        remark += f"; the photos have {listed(sorted(seen.fields))}; --label-field NAME says which it is"
    return Labels(field), remark


def collect(shards: Sequence[Shard], field: str | None, *, quiet: bool) -> tuple[str, ...]:
    """Return the names of all labels, sorted."""
    found: set[str] = set()

    def names_of(shard: Shard) -> set[str]:
        return {label.text for label, _ in _labels(shard, Labels(field)) if isinstance(label.value, str)}

    with (
        Progress("names of the classes", noun="shard", quiet=quiet) as progress,
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


def _declared(shards: Sequence[Shard], labels: Labels) -> Iterator[tuple[str, ...] | None]:
    """Yield what each shard says of the names of its classes, if it is whole."""
    for shard in shards:
        try:
            yield shard.class_names(labels)
        except SourceError:  # damage: whoever reads the photos will come to it
            continue


def _labels(shard: Shard, labels: Labels) -> Iterator[tuple[Label, dict[str, bytes]]]:
    """Yield the labels of a shard, up to where it is damaged: whoever reads the photos will come to that."""
    try:
        yield from shard.label_values(labels)
    except SourceError:
        return
