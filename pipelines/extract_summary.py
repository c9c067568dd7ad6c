"""What an extraction did, and what the cache holds now."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipelines.prepare import TargetJob
from tec_cache.cache.layout import Unit
from tec_cache.cache.reader import Cache
from tec_cache.codec import ArraySpec
from tec_cache.errors import CacheError


@dataclass
class Summary:
    """What an extraction did and what the cache holds now."""

    cache: str
    fingerprint: str
    target: str | None = None
    num_views: int = 0
    photos: int = 0
    """Photos with views, broken ones not counted."""
    skipped: list[list[str]] = field(default_factory=list)
    """[shard, key or "", reason] of everything left out."""
    units: int = 0
    views_made: int = 0
    """Crops written by this run (of this process)."""
    targets_made: int = 0
    bytes_per_crop: float = 0.0
    bytes_per_target: float = 0.0
    most_bytes_per_target: int = 0
    """Of the target set's arrays before they are compressed."""
    quality: str = ""
    asked_errors: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """Of the stored targets, measured on views that the codec was not fitted on."""
    source_shards: int = 0
    source_bytes: int = 0
    """Of the shards, where they are tars."""
    free_disk: int | None = None
    shards_left: int = 0
    first_row: str = ""
    """Whose attention row 0 of the targets is."""
    facts: list[list[str]] = field(default_factory=list)
    """What the base assumes that no shape shows: [name, value, who says so]."""
    num_targets: int = 0
    """Target sets in the cache."""
    seconds: float = 0.0
    making_seconds: float = 0.0
    """Of these, of making views and targets, without preparing and fitting."""
    busy: dict[str, float] = field(default_factory=dict)
    """Share of the latter that each stage was at work; the rest it waited."""
    missing: int = 0
    to_remove: int = 0
    """Units of targets that --overwrite would remove; of a dry run."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def row_bytes(arrays: dict[str, ArraySpec]) -> int:
    """Return the bytes of one row of all arrays."""
    return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in arrays.values())


def describe(summary: Summary, cache: Cache, job: TargetJob | None) -> None:
    """Fill in what the cache holds now."""
    units = [unit for unit in cache.view_units if unit.view < summary.num_views]
    target = cache[job.name] if job is not None and job.name in cache.target_names else None
    coded = set(target.units) if target is not None else set()
    if job is not None and job.replaces:
        summary.to_remove, target, coded = len(coded), None, set()

    def counts(unit: Unit) -> tuple[int, int, list[list[str]], int, int]:
        record = cache.views_record(unit)
        rows = size = 0
        if target is not None and unit in coded:
            targets = target.record(unit, record)
            rows, size = targets.count, targets.payload.size if targets.payload else 0
        skipped = [[cache.shards[unit.shard], *pair] for pair in record.skipped] if unit.view == 0 else []
        return len(record.keys), record.payload.size if record.payload else 0, skipped, rows, size

    found = cache.of_units(units, counts)
    summary.units, crops, rows = len(units), sum(c for c, *_ in found), sum(f[3] for f in found)
    for unit, (photos, _, skipped, _, _) in zip(units, found, strict=True):
        summary.photos += photos if unit.view == 0 else 0
        summary.skipped += skipped
    for number, name in enumerate(cache.shards):
        record_of = cache.source_record(number)
        if record_of is None:
            summary.shards_left += 1
        elif record_of.damage:
            summary.skipped.append([name, "", record_of.damage])
    summary.bytes_per_crop = sum(f[1] for f in found) / crops if crops else 0.0
    summary.bytes_per_target = sum(f[4] for f in found) / rows if rows else 0.0
    summary.free_disk = cache.store.free()
    summary.num_targets = len(cache.target_names)
    summary.missing = len(cache.missing_units(summary.num_views, job.name if job else None))
    if job is not None and job.replaces:
        summary.missing = len(units)


def require_finished(summary: Summary) -> None:
    """Raise CacheError where units are missing although everything was done that this process could do."""
    if summary.missing:
        raise CacheError(f"{summary.missing} units are missing", where=summary.cache, todo="run the same command again")
