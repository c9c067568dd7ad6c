"""The first directory of a TIFF file; an EXIF block is one too. What cannot be read of it is passed over."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

ORIENTATION = 274

_INTEGERS = {1: "B", 3: "H", 4: "I", 7: "B", 16: "Q"}
"""Field type -> struct code; of the other types no tag that decides about pixels is made."""


class Entry(NamedTuple):
    """One tag as it is written: its type, how many values, and its last field (the values, or where they are)."""

    kind: int
    num_values: int
    field: bytes


@dataclass(frozen=True)
class Directory:
    """The tags of a directory."""

    data: bytes
    order: str
    """Byte order as `struct` names it."""
    big: bool
    """BigTIFF, whose positions take 8 bytes."""
    entries: dict[int, tuple[Entry, ...]]
    """Tag -> what is written of it, more than one entry where the tag is repeated."""
    cut: bool
    """Whether it ends before its last entry."""

    def numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Return the values of a tag of whole numbers, `default` where it is missing. Raises ValueError."""
        if tag not in self.entries:
            return default
        entry = self.entries[tag][0]
        if entry.kind not in _INTEGERS:
            raise ValueError(f"tag {tag} is of type {entry.kind}, which is no whole number")
        code = _INTEGERS[entry.kind]
        size = struct.calcsize(code) * entry.num_values
        start = int.from_bytes(entry.field, "little" if self.order == "<" else "big")
        values = entry.field[:size] if size <= len(entry.field) else self.data[start : start + size]
        if len(values) < size:
            raise ValueError(f"the values of tag {tag} lie beyond the end")
        return struct.unpack(f"{self.order}{entry.num_values}{code}", values)


def read_directory(data: bytes) -> Directory:
    """Read the first directory of a TIFF file or EXIF block. Raises ValueError where none begins."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    version = struct.unpack(f"{order}H", data[2:4])[0] if order and len(data) >= 8 else 0
    if version not in (42, 43):
        raise ValueError("it has no TIFF header")
    big = version == 43
    place, number, row = ("Q", "Q", "HHQ8s") if big else ("I", "H", "HHI4s")
    try:
        (start,) = struct.unpack_from(f"{order}{place}", data, 8 if big else 4)
        (count,) = struct.unpack_from(f"{order}{number}", data, start)
    except struct.error as error:
        raise ValueError("its directory lies beyond the end") from error
    start += struct.calcsize(f"{order}{number}")
    size = struct.calcsize(f"{order}{row}")
    there = min(count, (len(data) - start) // size)
    entries: dict[int, tuple[Entry, ...]] = {}
    for tag, *rest in struct.iter_unpack(f"{order}{row}", data[start : start + there * size]):
        entries[tag] = (*entries.get(tag, ()), Entry(*rest))
    return Directory(data, str(order), big, entries, there < count)


def with_tags(directory: Directory, tags: frozenset[int]) -> bytes:
    """Return the file with a directory that holds only some of the tags, and no second image.

    The new directory is written behind the file's end, so that all positions within stay what they are.
    """
    big, order = directory.big, directory.order
    rows = [
        struct.pack(f"{order}HH{'Q8s' if big else 'I4s'}", tag, *entries[0])
        for tag, entries in sorted(directory.entries.items())
        if tag in tags
    ]
    data = directory.data + bytes(len(directory.data) % 2)
    place = struct.pack(f"{order}{'Q' if big else 'I'}", len(data))
    number = struct.pack(f"{order}{'Q' if big else 'H'}", len(rows))
    head = data[:8] + place if big else data[:4] + place
    return head + data[len(head) :] + number + b"".join(rows) + bytes(8 if big else 4)
