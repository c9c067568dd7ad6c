"""What an extraction did, and what the cache holds now."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipelines.extraction.label_counts import LabelCounter, LabelCounts, indexed_counts
from pipelines.extraction.prepare_targets import TargetJob
from tec_cache.cache.index.heading import TargetsHeading, ViewsHeading
from tec_cache.cache.index.reading import UnitIndex
from tec_cache.cache.layout import Unit
from tec_cache.cache.reader import Cache
from tec_cache.codec import ArraySpec
from tec_cache.data.passed_over import PassedOver, passed_over_text
from tec_cache.data.source import Source
from tec_cache.errors import CacheError, SourceError
from tec_cache.printable import are, counted


@dataclass
class Summary:
    """What an extraction did and what the cache holds now."""

    cache: str
    fingerprint: str
    target: str | None = None
    num_views: int = 0
    photos: int = 0
    """Number of photos with views, not counting broken ones."""
    skipped: list[list[str]] = field(default_factory=list)
    """[shard, key or "", reason] of everything left out."""
    notes: list[list[str]] = field(default_factory=list)
    """[shard, key, text]: what was not understood, and not needed, in photos that have views."""
    labels: LabelCounts = field(default_factory=LabelCounts)
    passed_over: dict[str, int] = field(default_factory=dict)
    """Kind -> how many things in the source are not photos."""
    remarks: list[str] = field(default_factory=list)
    """What was assumed about the source."""
    units: int = 0
    views_made: int = 0
    """Number of crops that this process wrote in this run."""
    targets_made: int = 0
    bytes_per_crop: float = 0.0
    bytes_per_target: float = 0.0
    most_bytes_per_target: int = 0
    """Size of a view's target arrays before they are compressed."""
    quality: str = ""
    asked_errors: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """Errors of the stored targets, measured on views that the codec was not fitted on."""
    checked_views: int = 0
    """Number of these views."""
    source_shards: int = 0
    source_files: bool = False
    """Whether the photos are single files, which are taken together as shards."""
    source_bytes: int = 0
    """Bytes of the source shards, if they are tars."""
    free_disk: int | None = None
    shards_left: int = 0
    first_row: str = ""
    """Whose attention is in row 0 of the targets."""
    facts: list[list[str]] = field(default_factory=list)
    """What the base assumes that no shape shows: [name, value, who says so]."""
    computed: dict[str, Any] = field(default_factory=dict)
    """On what the targets are computed: device, precision, batch_size and threads, which decide their last bits."""
    num_targets: int = 0
    """Number of target sets in the cache."""
    seconds: float = 0.0
    making_seconds: float = 0.0
    """The part of `seconds` spent on making views and targets, without preparing and fitting."""
    busy: dict[str, float] = field(default_factory=dict)
    """Share of `making_seconds` in which each stage was at work; the rest of the time it waited."""
    missing: int = 0
    to_remove: int = 0
    """Number of units of targets that --overwrite would remove; in a dry run."""
    foreign: list[str] = field(default_factory=list)
    """Foreign files in the cache, which --overwrite left there."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def row_bytes(arrays: dict[str, ArraySpec]) -> int:
    """Return the bytes of one row of all arrays."""
    return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in arrays.values())


class _UnitFacts(NamedTuple):
    """What the records of a unit say; the lists are those of view 0."""

    crops: int
    crop_bytes: int
    rows: int = 0
    target_bytes: int = 0
    skipped: list[list[str]] = []  # noqa: RUF012  never changed
    notes: list[list[str]] = []  # noqa: RUF012
    labels: list[int | None] = []  # noqa: RUF012


def describe(summary: Summary, cache: Cache, job: TargetJob | None, source: Source) -> None:
    """Fill in what the cache holds now. source: what was given to be extracted, if anything."""
    summary.remarks = list(source.remarks)
    index = cache.index
    if index is not None and index.heading.num_views == summary.num_views and not (job is not None and job.replaces):
        coded_index = cache[job.name].index if job is not None and job.name in cache.target_names else None
        if job is None or (coded_index is not None and coded_index.heading.num_views == summary.num_views):
            _describe_indexed(summary, cache, index, coded_index)
            return
    units = [unit for unit in cache.view_units if unit.view < summary.num_views]
    target = cache[job.name] if job is not None and job.name in cache.target_names else None
    coded = set(target.units) if target is not None else set()
    if job is not None and job.replaces:
        summary.to_remove, target, coded = len(coded), None, set()

    labels = LabelCounter()

    def facts(unit: Unit) -> _UnitFacts:
        record = cache.views_record(unit)
        size = record.payload.size if record.payload else 0
        found = _UnitFacts(len(record.keys), size)
        if unit.view == 0:
            shard = cache.shards[unit.shard]
            skipped, notes = ([[shard, *pair] for pair in pairs] for pairs in (record.skipped, record.notes))
            found = found._replace(skipped=skipped, notes=notes, labels=record.labels)
        if target is not None and unit in coded:
            targets = target.record(unit, record)
            found = found._replace(rows=targets.count, target_bytes=targets.payload.size if targets.payload else 0)
        return found

    found = cache.of_units(units, facts)
    summary.units, rows = len(units), sum(unit.rows for unit in found)
    crops = sum(unit.crops for unit in found)
    for unit, fact in zip(units, found, strict=True):
        summary.photos += fact.crops if unit.view == 0 else 0
        summary.skipped += fact.skipped
        summary.notes += fact.notes
        labels.add(fact.labels)
    summary.labels = labels.counts(cache.identity)
    passed_over = PassedOver()
    for number, name in enumerate(cache.shards):
        record_of = cache.source_record(number)
        if record_of is None:
            summary.shards_left += 1
            passed_over.update(source.passed_over if number == 0 else {})
            continue
        passed_over.update(record_of.passed_over)
        if record_of.damage:
            summary.skipped.append([name, "", record_of.damage])
    summary.passed_over = passed_over.told()
    summary.bytes_per_crop = sum(unit.crop_bytes for unit in found) / crops if crops else 0.0
    summary.bytes_per_target = sum(unit.target_bytes for unit in found) / rows if rows else 0.0
    summary.free_disk = cache.store.free()
    summary.num_targets = len(cache.target_names)
    summary.missing = len(cache.missing_units(summary.num_views, job.name if job else None))
    if job is not None and job.replaces:
        summary.missing = len(units)


def _describe_indexed(
    summary: Summary, cache: Cache, index: UnitIndex[ViewsHeading], coded: UnitIndex[TargetsHeading] | None
) -> None:
    """Fill in what a finished cache holds, by its index; only of groups with broken or odd photos records are read."""
    summary.units, first = len(index), index.entries["view"] == 0
    summary.photos = int(index.entries["rows"][first].sum(dtype=np.int64))
    odd = np.flatnonzero(first & ((index.entries["skipped"] > 0) | (index.entries["noted"] > 0)))
    units = [index.unit(number) for number in odd.tolist()]
    records = cache.of_units(units, lambda unit: (cache.views_record(unit).skipped, cache.views_record(unit).notes))
    for unit, (skipped, notes) in zip(units, records, strict=True):
        shard = cache.shards[unit.shard]
        summary.skipped += [[shard, *pair] for pair in skipped]
        summary.notes += [[shard, *pair] for pair in notes]
    summary.labels = indexed_counts(index.heading.labels, cache.identity)
    passed_over = PassedOver()
    passed_over.update(index.heading.passed_over)
    summary.passed_over = passed_over.told()
    summary.skipped += [
        [cache.shards[int(n)], "", why]
        for n, why in sorted(index.heading.damaged.items(), key=lambda item: int(item[0]))
    ]
    summary.bytes_per_crop = index.num_bytes / index.num_rows if index.num_rows else 0.0
    if coded is not None and coded.num_rows:
        summary.bytes_per_target = coded.num_bytes / coded.num_rows
    summary.free_disk, summary.num_targets = cache.store.free(), len(cache.target_names)


def require_finished(summary: Summary) -> None:
    """Raise CacheError where units are missing although everything was done that this process could do."""
    if summary.missing:
        raise CacheError(
            f"{counted(summary.missing, 'unit')} {are(summary.missing)} missing",
            where=summary.cache,
            todo="run the same command again",
        )


def require_photos(summary: Summary, where: str | None) -> None:
    """Raise SourceError where all photos were read and none could be used."""
    if summary.photos or summary.shards_left or summary.missing:  # others may have some that are not done yet
        return
    reasons = [f"{shard} {key}: {reason}" for shard, key, reason in summary.skipped[:3]]
    if len(summary.skipped) > len(reasons):
        reasons.append(f"{len(summary.skipped)} were left out in all")
    if summary.passed_over:
        reasons.append(f"passed over: {passed_over_text(summary.passed_over)}")
    what = f"no photo could be used: {'; '.join(reasons)}" if reasons else "there are no photos"
    raise SourceError(what, where=where or summary.cache, todo="mend the photos, or give others")
