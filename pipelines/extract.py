"""Stage one: photos -> views -> base -> targets -> cache. Paid once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from pipelines.extract_summary import Summary, describe, row_bytes
from pipelines.prepare import TargetJob, lock_views, prepare_cache, prepare_targets
from tec_cache.cache.layout import Unit
from tec_cache.cache.pixels import JpegSettings, decode_crop, resize
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import SourceRecord, ViewsRecord, hash_keys
from tec_cache.cache.writer import Crop, TargetArrays, commit_targets, commit_views
from tec_cache.config import ExtractConfig
from tec_cache.data.source import Photo, Shard, TarShard
from tec_cache.data.views import ViewPlan, cut_photo
from tec_cache.device import available_cores
from tec_cache.distributed import Ranks
from tec_cache.errors import NonFiniteError, SourceError
from tec_cache.progress import Progress
from tec_cache.targets import normalize_targets

T = TypeVar("T")


def extract(
    config: ExtractConfig,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    ranks: Ranks | None = None,
) -> Summary:
    """Write the views of some photos and the targets of one base over them.

    Goes on where an earlier run stopped. With ranks (torchrun), each process does its own units. Raises
    ConfigError, IdentityError, SourceError, WeightsError, NonFiniteError or CacheError.
    """
    ranks = ranks or Ranks.from_environment()
    quiet = quiet or not ranks.main
    begin = time.monotonic()
    with ExitStack() as locks, ExitStack() as views_lock:
        if config.input is not None and not dry_run:
            views_lock.enter_context(lock_views(config, ranks))
        cache, plan, jpeg, shards, num_views = prepare_cache(config, dry_run=dry_run, overwrite=overwrite, ranks=ranks)
        job = None
        if config.base or config.name:
            job = prepare_targets(config, cache, dry_run=dry_run, overwrite=overwrite, ranks=ranks, locks=locks)
        summary = Summary(config.cache, cache.fingerprint, job.name if job else None, num_views)
        if not dry_run:
            workers = config.workers or available_cores()
            with ThreadPoolExecutor(workers, thread_name_prefix="photos") as pool:
                with Progress("views", quiet=quiet) as progress:
                    for number, shard in enumerate(shards):
                        views = ViewsOfShard(cache, number, shard, plan, jpeg, num_views, config.on_error, ranks)
                        summary.views_made += views.make(pool, progress)
                views_lock.close()  # others may add targets now
                if job is not None:
                    summary.targets_made = make_targets(cache, job, num_views, pool, ranks, quiet)
        summary.source_shards = len(cache.shards)
        summary.source_bytes = sum(shard.size for shard in shards if isinstance(shard, TarShard))
        if job is not None:
            summary.first_row = job.base.first_row if job.spec.k is not None else ""
            summary.most_bytes_per_target = row_bytes(job.codec.arrays(job.spec))
        describe(summary, Cache(cache.layout, cache.manifest), job)
        summary.seconds = time.monotonic() - begin
        return summary


@dataclass
class ViewsOfShard:
    """The views of one source shard."""

    cache: Cache
    number: int
    shard: Shard
    plan: ViewPlan
    jpeg: JpegSettings
    num_views: int
    on_error: str
    ranks: Ranks

    def make(self, pool: ThreadPoolExecutor, progress: Progress) -> int:
        """Cut and commit what is missing; return the number of crops written."""
        before = self.cache.source_record(self.number)
        if self._finished(before):
            return 0
        made, photos, damage = 0, 0, ""
        take = self.cache.identity["source"]["shards"][self.number].get("take")
        size = self.cache.identity["group_size"]
        stream = islice(self.shard.photos(), take)
        group: list[Photo] = []
        try:
            for photo in stream:
                # photos of other ranks are counted and let go
                group.append(photo if self._mine(photos // size) else Photo(photo.key, b"", None))
                photos += 1
                if len(group) == size:
                    made += self._commit_group((photos - 1) // size, group, pool, progress)
                    group = []
        except SourceError as error:
            if self.on_error == "stop":
                raise
            damage = error.what
        if group:
            made += self._commit_group((photos - 1) // size, group, pool, progress)
        groups = -(-photos // size)
        record = SourceRecord(shard=self.shard.name, size=self.shard.size, photos=photos, groups=groups, damage=damage)
        if before is not None and before != record:
            raise SourceError(
                f"the shard has changed since the first extraction: {before} then, {record} now",
                where=self.shard.place,
                todo="restore it, or make a new cache",
            )
        record.write(self.cache.layout.source_record(self.number))
        return made

    def _mine(self, group: int) -> bool:
        return self.ranks.owns(self.number, group, len(self.cache.shards))

    def _finished(self, record: SourceRecord | None) -> bool:
        """Say whether nothing is left to do, without opening the shard."""
        return record is not None and not any(
            self._missing(group) for group in range(record.groups) if self._mine(group)
        )

    def _missing(self, group: int) -> list[int]:
        units = (Unit(self.number, group, view) for view in range(self.num_views))
        return [unit.view for unit in units if not self.cache.layout.views_record(unit).exists()]

    def _commit_group(self, group: int, photos: list[Photo], pool: ThreadPoolExecutor, progress: Progress) -> int:
        """Decode each photo once, cut all missing views, commit a unit for each view."""
        numbers = self._missing(group) if self._mine(group) else []
        if not numbers:
            return 0
        results = list(pool.map(lambda p: cut_photo(p, self.shard.name, self.plan, numbers, self.jpeg), photos))
        skipped = [(p.key, problem) for p, (_, problem) in zip(photos, results, strict=True) if problem]
        if skipped and self.on_error == "stop":
            key, problem = skipped[0]
            raise SourceError(
                f"photo {key!r}: {problem}",
                where=self.shard.place,
                todo="mend it, or leave broken photos out: --on-error skip",
            )
        good = [(p, jpegs) for p, (jpegs, problem) in zip(photos, results, strict=True) if not problem]
        self._check_growth(group, [p.key for p, _ in good])
        for i, view in enumerate(numbers):
            crops = [Crop(p.key, jpegs[i], p.label) for p, jpegs in good]
            unit = Unit(self.number, group, view)
            record = commit_views(self.cache.layout, unit, crops, skipped, self.cache.fingerprint)
            progress.advance(len(crops), record.tar_bytes, f"{len(skipped)} skipped" if skipped else "")
        return len(good) * len(numbers)

    def _check_growth(self, group: int, keys: list[str]) -> None:
        """Refuse to add views of other photos than the views that are there show."""
        first = self.cache.layout.views_record(Unit(self.number, group, 0))
        if first.exists() and ViewsRecord.read(first).keys_sha256 != hash_keys(keys):
            raise SourceError(
                f"group {group} now holds other photos than when its first view was made",
                where=self.shard.place,
                todo="restore the shard, or make a new cache",
            )


def make_targets(
    cache: Cache, job: TargetJob, num_views: int, pool: ThreadPoolExecutor, ranks: Ranks, quiet: bool
) -> int:
    """Run the base over every unit of views that has no targets yet; return the number of rows written."""
    cache = Cache(cache.layout, cache.manifest)  # a fresh list of units
    units = [u for u in cache.view_units if u.view < num_views and ranks.owns(u.shard, u.group, len(cache.shards))]
    left = [u for u in units if not cache.layout.target_record(job.name, u).exists()]
    made = 0
    total = sum(len(cache.views_record(unit).keys) for unit in left)
    with Progress(f"targets {job.name}", total=total, quiet=quiet) as progress:
        for i, unit in enumerate(left):
            views = cache.views_record(unit)
            arrays = TargetArrays(len(views.keys), job.codec.arrays(job.spec))
            for rows, images in base_batches(cache, unit, views, job, pool):
                arrays.add(encode_batch(job, images, [views.keys[r] for r in rows], unit))
                progress.advance(len(rows), note=f"unit {i + 1} of {len(left)}")
            record = commit_targets(cache.layout, job.name, unit, arrays, views, job.fingerprint)
            progress.advance(0, record.num_bytes, note=f"unit {i + 1} of {len(left)}")
            made += arrays.count
    return made


def base_batches(
    cache: Cache, unit: Unit, views: ViewsRecord, job: TargetJob, pool: ThreadPoolExecutor
) -> Iterator[tuple[range, torch.Tensor]]:
    """Yield (rows, normalized images on the device) of one unit; a batch never crosses a unit.

    The base sees the decoded stored crops, the very pixels the student will see.
    """
    count, size = len(views.keys), job.batch_size

    def pixels(row: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        (crop,) = cache.read_crops(unit, views, [row])
        return resize(decode_crop(crop), job.base.input_size)

    def submit(start: int) -> tuple[range, list[Future[Any]]]:
        rows = range(start, min(start + size, count))
        return rows, [pool.submit(pixels, row) for row in rows]

    mean = torch.tensor(job.base.mean, device=job.compute.device)[:, None, None]
    std = torch.tensor(job.base.std, device=job.compute.device)[:, None, None]
    for rows, futures in one_ahead(submit, range(0, count, size)):
        batch = torch.from_numpy(np.stack([future.result() for future in futures]))
        batch = batch.to(job.compute.device).permute(0, 3, 1, 2).float().div_(255)
        yield rows, batch.sub_(mean).div_(std)


def one_ahead(start: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    """Start each item one step before it is needed, so that decoding overlaps the base."""
    waiting: list[T] = []
    for item in items:
        waiting.append(start(item))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def encode_batch(job: TargetJob, images: torch.Tensor, keys: list[str], unit: Unit) -> dict[str, Any]:
    """Run the base on a batch, normalize, check that every number is finite, and encode."""
    with job.compute.autocast():
        raw = job.base(images)
    targets = normalize_targets(raw, job.spec.normalization)
    finite = torch.isfinite(targets.features).flatten(1).all(1)
    if targets.attention is not None:
        finite &= torch.isfinite(targets.attention).flatten(1).all(1)
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"the base gives a target that is not finite for {keys[bad]!r}",
            where=f"unit {unit}",
            todo="check the weights; with bfloat16, try --precision float32",
        )
    return job.codec.encode(targets, job.spec)
