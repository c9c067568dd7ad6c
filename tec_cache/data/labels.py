"""The label of a sample: a number or a name, in KEY.cls, in a field of KEY.json, or where the user says.

A label is never a reason to refuse a photo: one that cannot be understood leaves the photo without, and a note.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tec_cache.printable import counted

JSON_FIELDS = ("label", "cls", "class", "class_id", "label_id", "target")
"""Fields of KEY.json in which a label is looked for, in this order."""

LOOKED_FOR = f"KEY.cls and {', '.join(JSON_FIELDS)} in KEY.json"
"""Where a label is looked for if nobody says where, for people."""

MOST_CHARACTERS = 200
"""Characters of a class's name. A caption, which is no class, is often longer."""

_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
"""A whole number that surely has 64 bits, as the arrays of labels that are made of it; a longer one is unreadable."""


class Label(NamedTuple):
    """What a sample says of its class."""

    value: int | str | None
    """A number, or a name; None where there is no label, or none that can be understood."""
    note: str = ""
    """Why a label that is there was not understood."""
    text: str = ""
    """The value as it is written: a class may be called 007."""


@dataclass(frozen=True)
class Labels:
    """Where the labels of samples are, and what they mean."""

    field: str | None = None
    """The member (KEY.FIELD) or field of KEY.json that holds the label; None: KEY.cls, else one of JSON_FIELDS."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers; None where labels are numbers."""

    def wanted(self, name: str) -> bool:
        """Say whether a member may hold a label, or decide whether it is one."""
        suffixes = {"cls", "json", "txt", (self.field or "").lower().rpartition(".")[2]}
        return name.lower().rpartition(".")[2] in suffixes

    def number(self, label: Label) -> tuple[int | None, str]:
        """Return the number of a label, and a note where there is a label that is not understood."""
        value = label.value
        if value is None:
            return None, label.note
        if self.classes is None:
            if isinstance(value, str):
                return None, f"its label {_short(value)} is a name, where labels are numbers"
            return value, ""
        number = self._numbers.get(label.text)
        if number is None:
            return None, f"its label {_short(label.text)} is none of the {counted(len(self.classes), 'class')}"
        return number, ""

    def read(self, fields: Mapping[str, bytes]) -> Label:
        """Return the label of a sample as it is written: a number or a name.

        fields: field in lower case -> bytes of the member.
        """
        if self.field is not None:
            return self._read_named(fields, self.field)
        texts = _of_suffix(fields, "cls")
        if len(texts) > 1:
            return Label(None, f"each of {', '.join(texts)} may be its label: name one with --label-field")
        if texts:
            return _from_text(fields[texts[0]])
        return _from_json([fields[name] for name in _of_suffix(fields, "json")], JSON_FIELDS)

    def _read_named(self, fields: Mapping[str, bytes], field: str) -> Label:
        lower = field.lower()
        members = [lower] if lower in fields else _of_suffix(fields, lower)
        if len(members) == 1:
            return _from_text(fields[members[0]])
        if members:
            return Label(None, f"each of {', '.join(members)} may be its label: give --label-field all of the name")
        label = _from_json([fields[name] for name in _of_suffix(fields, "json")], (field,))
        missing = label.value is None and not label.note
        return Label(None, f"it has no field {field!r}, which holds the labels") if missing else label

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes or ())}


def _of_suffix(fields: Mapping[str, bytes], suffix: str) -> list[str]:
    """Return the fields of a suffix: the plain one alone where there is one, else those with a name before it."""
    if suffix in fields:
        return [suffix]
    return sorted(name for name in fields if name.endswith(f".{suffix}"))


def _from_text(data: bytes) -> Label:
    """Read the text of a member as a label."""
    try:
        return _from_string(data.decode("utf-8-sig").strip())
    except UnicodeDecodeError:
        return Label(None, f"its label {data[:20]!r} is not text")


def _from_string(text: str) -> Label:
    if not text:
        return Label(None, "its label is empty")
    if _NUMBER.fullmatch(text):
        return Label(int(text), text=text)
    if len(text) > MOST_CHARACTERS or not text.isprintable() or _is_number(text):
        return Label(None, f"its label {_short(text)} is neither a whole number nor a name")
    return Label(text, text=text)


def _is_number(text: str) -> bool:
    """Say whether a text that is no whole number is some other one: 1.5, nan."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_json(documents: Sequence[bytes], names: Sequence[str]) -> Label:
    """Return the first of some fields that any of a sample's JSON documents has."""
    note = ""
    for document in documents:
        try:
            values: Any = json.loads(document)
        except (ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
            note = "its .json cannot be read"
            continue
        for name in names if isinstance(values, dict) else ():
            if values.get(name) is not None:
                return from_value(values[name])
    return Label(None, note)


def json_fields(document: bytes) -> list[str]:
    """Return the names of a JSON object's fields; none for any other document."""
    try:
        values: Any = json.loads(document)
    except (ValueError, RecursionError):
        return []
    return list(values) if isinstance(values, dict) else []


def from_value(value: Any) -> Label:
    """Read a value of JSON or of a table as a label: 3, 3.0, "3" or "dog"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | list | dict | float):
        return Label(None, f"its label {_short(value)} is neither a whole number nor a name")
    return _from_string(str(value).strip())


def _short(value: Any) -> str:
    text = repr(value[:50] if isinstance(value, str) else value)
    return text if len(text) <= 40 else text[:37] + "..."
