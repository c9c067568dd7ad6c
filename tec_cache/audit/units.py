"""Is the record of one unit in order, and the payload that it names? Nothing is changed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tec_cache.audit.findings import DROP, Finding, damaged_record
from tec_cache.audit.payloads import check_payload, sensible, tar_problem, zip_problem
from tec_cache.cache import layout
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.record import Payload, TargetRecord, ViewsRecord, hash_keys
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


class Checked(NamedTuple):
    """A unit, what its record says (None where that is not to be read) and what is wrong."""

    unit: Unit
    facts: Facts | None
    findings: list[Finding]


def check_views(store: Store, unit: Unit, *, full: bool) -> Checked:
    """Check the record of a unit's crops and its tar: by its size, or `full`, by its SHA-256 and its members."""
    name = layout.views_record(unit)
    try:
        record = ViewsRecord.read(store, name)
    except CacheError as error:
        return Checked(unit, None, [damaged_record(error, name, unit)])
    problem = sensible(lambda: _views_problem(record, unit))
    if problem:
        return Checked(unit, None, [Finding("record", name, str(unit), problem, DROP, (name,))])
    facts = Facts(record.identity, len(record.keys), len(record.skipped), record.keys_sha256, record.payload)
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
    problem = sensible(lambda: _targets_problem(record, target, unit, arrays))
    if problem:
        return Checked(unit, None, [Finding("record", name, str(unit), problem, DROP, (name,))])
    facts = Facts(
        record.identity,
        record.count,
        0,
        record.keys_sha256,
        record.payload,
        record.codec_sha256,
        record.views_sha256,
    )
    inside = (lambda stream: zip_problem(stream, record, arrays)) if full else None
    return Checked(unit, facts, check_payload(store, record.payload, name, unit, inside))


def _views_problem(record: ViewsRecord, unit: Unit) -> str:
    count, payload = len(record.keys), record.payload
    if record.unit != str(unit):
        return f"it is the record of unit {record.unit}"
    for what in ("labels", "offsets", "sizes", "crc32"):
        if len(getattr(record, what)) != count:
            return f"{count} keys, {len(getattr(record, what))} {what}"
    if hash_keys(record.keys) != record.keys_sha256:
        return "the hash of its keys does not fit"
    if (payload is None) != (count == 0):
        return f"{count} crops and {'no' if payload is None else 'a'} tar"
    if payload is None:
        return ""
    if payload.name != layout.views_payload(unit, payload.sha256):
        return f"it names {payload.name}, which is not this unit's"
    return _ranges_problem([(o, s) for o, s in zip(record.offsets, record.sizes, strict=True)], payload.size)


def _targets_problem(record: TargetRecord, target: str, unit: Unit, arrays: Mapping[str, ArraySpec] | None) -> str:
    payload = record.payload
    if record.unit != str(unit):
        return f"it is the record of unit {record.unit}"
    if (payload is None) != (record.count == 0):
        return f"{record.count} rows and {'no' if payload is None else 'a'} zip"
    if payload is None:
        return ""
    if payload.name != layout.target_payload(target, unit, payload.sha256):
        return f"it names {payload.name}, which is not this unit's"
    if arrays is not None and set(arrays) != set(record.blocks):
        return f"it has the arrays {sorted(record.blocks)}, the codec has {sorted(arrays)}"
    number = -(-record.count // BLOCK_ROWS)
    for array, blocks in record.blocks.items():
        if len(blocks) != number:
            return f"{len(blocks)} blocks of {array} for {record.count} rows"
    ranges = [(position, size) for blocks in record.blocks.values() for position, size, _ in blocks]
    return _ranges_problem(sorted(ranges), payload.size)


def _ranges_problem(ranges: list[tuple[int, int]], size: int) -> str:
    """Say whether ranges overlap, or leave the file."""
    end = 0
    for offset, length in ranges:
        if offset < end or length < 1:
            return "its byte ranges overlap"
        end = offset + length
    return "its byte ranges go beyond the file" if end > size else ""
