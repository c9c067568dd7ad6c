"""The binary file of an index: a prologue, details of each unit's rows, a table of all units, a heading in JSON.

All numbers are little-endian.

    0    8   the bytes TECINDEX
    8    4   version of this layout (uint32)
    12   4   bytes of an entry of the table (uint32)
    16   8   number of entries, one for each unit (uint64)
    24   8   position of the table: where the details end (uint64)
    32   8   position of the heading: where the table ends (uint64)
    40   8   bytes of the file (uint64)
    48   32  SHA-256 over bytes 0 to 47, the table and the heading
    80       details of the first unit, of the second, ...
             the table: ENTRY of each unit, sorted by source shard, group and view
             the heading

Details are not under that hash, because a reader fetches those of one unit at a time: each entry has their CRC-32.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tec_cache.cache.layout import Unit
from tec_cache.store import Store

if TYPE_CHECKING:
    import numpy.typing as npt

    Details = npt.NDArray[np.void]

MAGIC, VERSION = b"TECINDEX", 1
_HEAD = struct.Struct("<8sIIQQQQ")
PROLOGUE = _HEAD.size + hashlib.sha256().digest_size
MOST_TABLE_BYTES = 8 << 30
"""Of table and heading: 80 million units. They are held in memory."""

ENTRY = np.dtype(
    [
        ("shard", "<u4"),
        ("group", "<u4"),
        ("view", "<u4"),
        ("rows", "<u4"),  # crops, or rows of targets
        ("record_bytes", "<u4"),
        ("details_crc32", "<u4"),
        ("skipped", "<u4"),  # broken photos of the group
        ("noted", "<u4"),  # photos of which something was not understood
        ("payload_bytes", "<u8"),
        ("payload_sha256", "V32"),  # zeros where there is no payload
        ("views_sha256", "V32"),  # of the tar that targets were made from; zeros in an index of views
    ]
)


class Made(NamedTuple):
    """A unit as it goes into an index."""

    entry: npt.NDArray[np.void]
    """One ENTRY."""
    details: Details


class Table(NamedTuple):
    """What is held of an index: all but the details."""

    entries: npt.NDArray[np.void]
    """(N,) of ENTRY, sorted by unit."""
    heading: bytes


def entry(unit: Unit, details: Details, **values: Any) -> npt.NDArray[np.void]:
    """Return the entry of a unit; values: its other fields, hashes as hex digits."""
    made = np.zeros((), ENTRY)
    made["shard"], made["group"], made["view"] = unit
    made["details_crc32"] = zlib.crc32(details.tobytes())
    for name, value in values.items():
        made[name] = np.void(bytes.fromhex(value)) if isinstance(value, str) else value
    return made


def write_table(path: Path, units: Iterable[Made], heading: Any) -> None:
    """Write an index; units: sorted. heading: called after the last unit, gives the JSON.

    One unit's details are in memory at a time, and the table.
    """
    entries = []
    with path.open("wb") as stream:
        stream.write(bytes(PROLOGUE))
        for unit in units:
            entries.append(unit.entry)
            stream.write(unit.details.tobytes())
        start = stream.tell()
        table, text = np.array(entries, ENTRY).tobytes(), heading()
        head = _HEAD.pack(MAGIC, VERSION, ENTRY.itemsize, len(entries), start, start + len(table),
                          start + len(table) + len(text))  # fmt: skip
        stream.write(table + text)
        stream.seek(0)
        stream.write(head + hashlib.sha256(head + table + text).digest())


def read_table(store: Store, name: str) -> Table:
    """Read an index but for its details, in two requests. Raises OSError, or ValueError where it is damaged."""
    (prologue,) = store.read_ranges(name, [(0, PROLOGUE)])
    if len(prologue) < PROLOGUE or not prologue.startswith(MAGIC):
        raise ValueError("not an index")
    head = prologue[: _HEAD.size]
    _, version, entry_bytes, count, start, end, size = _HEAD.unpack(head)
    if version != VERSION:
        raise ValueError(f"an index of version {version}, this program reads {VERSION}")
    if entry_bytes != ENTRY.itemsize or end != start + count * entry_bytes or not PROLOGUE <= start <= end < size:
        raise ValueError("damaged: its positions make no sense")
    if size - start > MOST_TABLE_BYTES or store.size(name) != size:
        raise ValueError("damaged: it has another size than it says")
    (tail,) = store.read_ranges(name, [(start, size - start)])
    if hashlib.sha256(head + tail).digest() != prologue[_HEAD.size :]:
        raise ValueError("damaged: its SHA-256 does not fit its content")
    return Table(np.frombuffer(tail, ENTRY, count), tail[count * entry_bytes :])
