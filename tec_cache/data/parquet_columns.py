"""Which columns of a table hold the photos, their labels and the names of the classes.

As the data sets of the Hugging Face hub have them: a photo is a struct of `bytes` and `path`; a label is a number,
whose name the metadata of the file may say, or a name itself.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NamedTuple

from tec_cache.data.labels import JSON_FIELDS, MOST_CHARACTERS, Label, from_value
from tec_cache.errors import ConfigError, listed
from tec_cache.printable import counted

IMAGE = "image"
"""The column of the photos where several could be."""
LABEL = "label"
"""The column of the labels where several could be."""
LABELS = (*JSON_FIELDS, "labels")
"""Columns in which a label is looked for; so it is in one whose metadata name classes."""
UNKNOWN = -1
"""What the hub's data sets write for a class that is not told, in the photos to be judged on for one."""


class Columns(NamedTuple):
    """The columns of a table, by their names."""

    image: str
    has_path: bool
    """Whether photos have a path, which is then their key."""
    label: str | None
    names: tuple[str, ...] | None
    """Of the classes, in the order of their numbers, as the file's metadata say them."""
    others: tuple[str, ...]

    def read_label(self, value: Any) -> Label:
        """Read a value of the label column: a number by its name, where numbers have names."""
        if value is None or (self.names is not None and value == UNKNOWN):
            return Label(None)
        if self.names is None or type(value) is not int:
            return from_value(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
        if not 0 <= value < len(self.names):
            return Label(
                None, f"its label {value} is none of the {counted(len(self.names), 'class')} that its file names"
            )
        return Label(value, text=self.names[value])


def columns_of(schema: Any, label_field: str | None, where: str) -> Columns:
    """Choose among the columns of a `pyarrow.Schema`.

    label_field: column of the labels; None: `label`, or the only one that has the name of one. Raises ConfigError,
    which lists the columns, where they hold no photos, not this one, or several that may be meant.
    """
    every = [f"{field.name} ({str(field.type)[:60]})" for field in schema]
    names = [field.name for field in schema]
    images = [field for field in schema if _holds_photos(field.type)]
    chosen = [field for field in images if field.name == IMAGE] or images
    if len(chosen) != 1:
        what = f"each of {listed(field.name for field in chosen)} may hold the photos" if chosen else "no photos in it"
        raise ConfigError(
            f"{what}; its columns are {listed(every)}",
            where=where,
            todo=f"write the photos into one column {IMAGE!r}, struct<bytes: binary, path: string>",
        )
    image = chosen[0]
    classes = _class_names(schema)
    label = _label_column([name for name in names if name != image.name], set(classes), label_field, every, where)
    if twice := [name for name in (image.name, label) if name is not None and Counter(names)[name] > 1]:
        raise ConfigError(
            f"two of its columns are called {twice[0]!r}", where=where, todo="give each a name of its own"
        )
    return Columns(
        image.name,
        any(child.name == "path" and str(child.type) in ("string", "large_string") for child in image.type),
        label,
        classes.get(label) if label is not None else None,
        tuple(name for name in names if name not in (image.name, label)),
    )


def _holds_photos(kind: Any) -> bool:
    """Say whether a type is struct<bytes: binary, ...>."""
    import pyarrow

    return pyarrow.types.is_struct(kind) and any(
        child.name == "bytes" and (pyarrow.types.is_binary(child.type) or pyarrow.types.is_large_binary(child.type))
        for child in kind
    )


def _label_column(
    names: list[str], named: set[str], label_field: str | None, every: list[str], where: str
) -> str | None:
    if label_field is not None:
        if label_field not in names:
            what = f"it has no column {label_field!r} for the labels; its columns are {listed(every)}"
            raise ConfigError(what, where=where, todo="name one of them: --label-field NAME")
        return label_field
    if LABEL in names:
        return LABEL
    chosen = [name for name in names if name in LABELS or name in named]
    if len(chosen) > 1:
        what = f"each of {listed(chosen)} may hold the labels; its columns are {listed(every)}"
        raise ConfigError(what, where=where, todo="say which it is: --label-field NAME")
    return chosen[0] if chosen else None


def _class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    """Return the names of classes in the metadata that the hub's library writes, for each column that has some."""
    try:
        features: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        items = [(name, about.get("names")) for name, about in features.items() if isinstance(about, dict)]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):  # not as that library writes them
        return {}
    return {name: tuple(names) for name, names in items if isinstance(names, list) and _are_names(names)}


def _are_names(names: list[Any]) -> bool:
    texts = [name for name in names if isinstance(name, str) and name.isprintable() and len(name) <= MOST_CHARACTERS]
    return 0 < len(names) == len(set(texts))
