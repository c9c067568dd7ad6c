"""Making an index of the records: read several at a time, checked like any that is read, written in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Lock
from typing import TYPE_CHECKING

from tec_cache.background import in_order
from tec_cache.cache import layout
from tec_cache.cache.index.details import block_details, crop_details, member_details
from tec_cache.cache.index.heading import Labels, TargetsHeading, ViewsHeading
from tec_cache.cache.index.table import Made, entry, write_table
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.record import PackRecord, TargetRecord, ViewsRecord
from tec_cache.errors import CacheError
from tec_cache.pack.reader import PackedTargetRecord
from tec_cache.progress import Progress

if TYPE_CHECKING:
    from tec_cache.cache.reader import Cache
    from tec_cache.cache.target_set import TargetSet

THREADS = 16
"""Records are small; from an object store each is a round trip."""


def write_views_index(cache: Cache, progress: Progress) -> None:
    """Write the index of all views of a complete cache or pack. Raises CacheError for a bad record."""
    content = cache.content_record
    assert content is not None
    labels: set[int] = set()
    counts, lock = Labels(), Lock()

    def made(unit: Unit) -> Made:
        record = cache.views_record(unit)
        if unit.view == 0:
            known = [label for label in record.labels if label is not None]
            with lock:
                labels.update(known)
                counts.photos += len(record.keys)
                counts.labelled += len(known)
        return made_of_views(record, unit, cache.shards[unit.shard])

    def heading() -> bytes:
        counts.classes, counts.first, counts.last = len(labels), min(labels, default=None), max(labels, default=None)
        sources = cache.source_records
        passed_over: dict[str, int] = {}
        for record in sources.values():
            for kind, number in record.passed_over.items():
                passed_over[kind] = passed_over.get(kind, 0) + number
        return ViewsHeading(
            identity=cache.fingerprint,
            packed=cache.packed,
            num_views=cache.num_views,
            content_sha256=content.sha256,
            groups=[sources[shard].groups for shard in range(len(cache.shards))],
            labels=counts,
            passed_over=passed_over,
            damaged={str(shard): record.damage for shard, record in sources.items() if record.damage},
        ).to_bytes()

    _write(cache, layout.views_index(), cache.view_units, made, heading, progress)


def write_targets_index(target: TargetSet, num_views: int, progress: Progress) -> None:
    """Write the index of a target set that is complete in the first `num_views` views. Raises CacheError."""
    cache, codec, arrays = target.cache, target.codec_record.payload, sorted(target.arrays)

    def made(unit: Unit) -> Made:
        return made_of_targets(target.record(unit), unit, arrays)

    def heading() -> bytes:
        return TargetsHeading(
            identity=target.fingerprint,
            packed=cache.packed,
            num_views=num_views,
            codec_sha256=codec.sha256 if codec else "",
            arrays=arrays,
            block_rows=BLOCK_ROWS,
        ).to_bytes()

    units = [unit for unit in target.units if unit.view < num_views]
    _write(cache, layout.target_index(target.name), units, made, heading, progress)


def refresh(cache: Cache, progress: Progress, *, anew: bool = False) -> list[str]:
    """Write the indices that are missing or do not fit, of whatever is complete; return their names.

    cache: opened after the last change. Nothing is written into a cache of format version 1, or one that is not
    finished. anew: write also those that seem to fit. Raises CacheError for a bad record.
    """
    written: list[str] = []
    if not cache.bound or cache.content_record is None:
        return written
    if anew or cache.index is None or cache.index.heading.num_views < cache.num_views:
        if not cache.num_views or cache.missing_units(cache.num_views):
            return written
        progress.total = len(cache.view_units)
        write_views_index(cache, progress)
        written.append(layout.views_index())
        cache = cache.again()
    for name in cache.target_names:
        target = cache[name]
        whole = target.whole_views() if target.fitted else 0
        if whole and (anew or target.index is None or target.index.heading.num_views != whole):
            progress.total = progress.done + len(target.units)
            write_targets_index(target, whole, progress)
            written.append(layout.target_index(name))
    return written


def forget_stale(cache: Cache, target: str | None) -> None:
    """Remove the indices of units that are gone: they are about to be made again, perhaps otherwise.

    cache: opened just now. target: the set that is about to be extended.
    """
    index = cache.index
    if index is None:
        return
    if cache.missing_units(index.heading.num_views):
        cache.store.remove(layout.views_index())
    coded = cache[target].index if target is not None and target in cache.target_names else None
    if coded is not None and cache.missing_units(coded.heading.num_views, target):
        cache.store.remove(layout.target_index(str(target)))


def made_of_views(record: ViewsRecord, unit: Unit, shard: str) -> Made:
    """Return a unit of views as it goes into an index; shard: name of the source shard."""
    details, payload = crop_details(record, shard), record.payload
    values = {"payload_bytes": payload.size, "payload_sha256": payload.sha256} if payload else {}
    noted = len({key for key, _ in record.notes})
    return Made(
        entry(
            unit,
            details,
            rows=len(record.keys),
            record_bytes=len(record.to_bytes()),
            skipped=len(record.skipped),
            noted=noted,
            **values,
        ),
        details,
    )


def made_of_targets(record: TargetRecord, unit: Unit, arrays: Sequence[str]) -> Made:
    """Return a unit of targets as it goes into an index."""
    whole: TargetRecord | PackRecord = record
    if isinstance(record, PackedTargetRecord):
        details, whole = member_details(record.codes), record.views
    else:
        details = block_details(record, arrays)
    values = {"payload_bytes": record.payload.size, "payload_sha256": record.payload.sha256} if record.payload else {}
    if record.views_sha256:
        values["views_sha256"] = record.views_sha256
    return Made(entry(unit, details, rows=record.count, record_bytes=len(whole.to_bytes()), **values), details)


def _write(
    cache: Cache,
    name: str,
    units: Sequence[Unit],
    made: Callable[[Unit], Made],
    heading: Callable[[], bytes],
    progress: Progress,
) -> None:
    _ = cache.source_records  # once, and not by every thread

    def ahead() -> Generator[Made, None, None]:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="records") as pool:
            for unit in in_order(pool, made, iter(units), 4 * THREADS):
                progress.advance(1)
                yield unit

    with cache.store.draft() as draft, closing(ahead()) as rows:
        try:
            write_table(draft, rows, heading)
        except OverflowError as error:
            raise CacheError(f"a record with numbers that no index can hold: {error}", where=cache.store.url) from error
        cache.store.put(draft, name)
