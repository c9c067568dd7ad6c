"""Is the record of one unit in order, and the payload that it names? Nothing is changed here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tec_cache.audit.findings import DROP, Finding, damaged_record
from tec_cache.audit.payloads import check_payload, tar_problem, zip_problem
from tec_cache.cache import layout
from tec_cache.cache.identity import canonical_json
from tec_cache.cache.index.table import Made
from tec_cache.cache.index.writing import made_of_targets, made_of_views
from tec_cache.cache.layout import Unit
from tec_cache.cache.record import Payload, TargetRecord, ViewsRecord
from tec_cache.codec import ArraySpec
from tec_cache.errors import CacheError
from tec_cache.store import Store


class Facts(NamedTuple):
    """What is kept of a unit's record; the record itself may be long."""

    identity: str
    rows: int
    skipped: int
    keys_sha256: str
    payload: Payload | None
    codec_sha256: str = ""
    views_sha256: str = ""
    photos_sha256: str = ""
    labels_sha256: str = ""
    entry: bytes = b""
    """What an index has to say of the unit; empty where none can."""


class Checked(NamedTuple):
    """A unit, what its record says (None where that is not to be read) and what is wrong."""

    unit: Unit
    facts: Facts | None
    findings: list[Finding]


def check_views(store: Store, unit: Unit, shard: str, *, full: bool) -> Checked:
    """Check the record of a unit's crops and its tar: by its size, or `full`, by its SHA-256 and its members.

    shard: name of the source shard.
    """
    name = layout.views_record(unit)
    try:
        record = ViewsRecord.read(store, name)
    except CacheError as error:
        return Checked(unit, None, [damaged_record(error, name, unit)])
    facts = Facts(
        record.identity,
        len(record.keys),
        len(record.skipped),
        record.keys_sha256,
        record.payload,
        photos_sha256=record.photos_sha256,
        labels_sha256=hashlib.sha256(canonical_json(record.labels)).hexdigest(),
        entry=_entry(lambda: made_of_views(record, unit, shard)),
    )
    inside = (lambda stream: tar_problem(stream, record, unit)) if full else None
    return Checked(unit, facts, check_payload(store, record.payload, name, unit, inside))


def check_targets(
    store: Store, target: str, unit: Unit, arrays: Mapping[str, ArraySpec] | None, *, full: bool
) -> Checked:
    """Check the record of a unit's targets and its zip; arrays: those of the codec, None where that is damaged."""
    name = layout.target_record(target, unit)
    try:
        record = TargetRecord.read(store, name)
    except CacheError as error:
        return Checked(unit, None, [damaged_record(error, name, unit)])
    if record.count and arrays is not None and set(arrays) != set(record.blocks):
        problem = f"it has the arrays {sorted(record.blocks)}, the codec has {sorted(arrays)}"
        return Checked(unit, None, [Finding("record", name, str(unit), problem, DROP, (name,))])
    facts = Facts(
        record.identity,
        record.count,
        0,
        record.keys_sha256,
        record.payload,
        record.codec_sha256,
        record.views_sha256,
        entry=_entry(lambda: made_of_targets(record, unit, sorted(arrays))) if arrays is not None else b"",
    )
    inside = (lambda stream: zip_problem(stream, record, arrays)) if full else None
    return Checked(unit, facts, check_payload(store, record.payload, name, unit, inside))


def _entry(made: Callable[[], Made]) -> bytes:
    try:
        return made().entry.tobytes()
    except OverflowError:  # numbers that no index can hold, and no payload reaches
        return b""
