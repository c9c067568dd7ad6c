"""What an extraction did, and what the cache holds now."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipelines.prepare import TargetJob
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
    """Of the target set before lossless compression, which gains a few per cent."""
    source_shards: int = 0
    source_bytes: int = 0
    """Of the shards, where they are tars."""
    free_disk: int = 0
    shards_left: int = 0
    first_row: str = ""
    """Whose attention row 0 of the targets is."""
    num_targets: int = 0
    """Target sets in the cache."""
    seconds: float = 0.0
    missing: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def row_bytes(arrays: dict[str, ArraySpec]) -> int:
    """Return the bytes of one row of all arrays."""
    return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in arrays.values())


def describe(summary: Summary, cache: Cache, job: TargetJob | None) -> None:
    """Fill in what the cache holds now."""
    crops, crop_bytes, rows, target_bytes = 0, 0, 0, 0
    for unit in cache.view_units:
        if unit.view >= summary.num_views:
            continue
        views = cache.views_record(unit)
        summary.units += 1
        crops += len(views.keys)
        crop_bytes += views.tar_bytes
        if unit.view == 0:
            summary.photos += len(views.keys)
            summary.skipped += [[cache.shards[unit.shard], *pair] for pair in views.skipped]
        if job is not None and cache.layout.target_record(job.name, unit).exists():
            record = cache[job.name].record(unit)
            rows += record.count
            target_bytes += record.num_bytes
    for number, name in enumerate(cache.shards):
        record_of = cache.source_record(number)
        if record_of is None:
            summary.shards_left += 1
        elif record_of.damage:
            summary.skipped.append([name, "", record_of.damage])
    summary.bytes_per_crop = crop_bytes / crops if crops else 0.0
    summary.bytes_per_target = target_bytes / rows if rows else 0.0
    root = next(p for p in [cache.layout.root.absolute(), *cache.layout.root.absolute().parents] if p.exists())
    summary.free_disk = shutil.disk_usage(root).free
    summary.num_targets = len(cache.target_names)
    summary.missing = len(cache.missing_units(summary.num_views, job.name if job else None))


def require_finished(summary: Summary) -> None:
    """Raise CacheError where units are missing although everything was done that this process could do."""
    if summary.missing:
        raise CacheError(f"{summary.missing} units are missing", where=summary.cache, todo="run the same command again")
