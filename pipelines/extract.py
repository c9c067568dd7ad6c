"""Stage one: photos -> views -> base -> targets -> cache. Paid once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from pipelines.base_batches import base_targets
from pipelines.extract_summary import Summary, describe, row_bytes
from pipelines.fit import Coded, ensure_codec
from pipelines.make_views import ViewsOfShard
from pipelines.prepare import TargetJob, ViewJob, prepare_cache, prepare_targets
from pipelines.storage import Needed, explained_storage
from tec_cache.cache import layout
from tec_cache.cache.reader import Cache
from tec_cache.cache.remove import working
from tec_cache.cache.writer import TargetArrays, commit_targets
from tec_cache.config import ExtractConfig, parse_part
from tec_cache.data.source import TarShard
from tec_cache.device import available_cores
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError
from tec_cache.progress import Progress
from tec_cache.store import open_store


def extract(
    config: ExtractConfig,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    fit_only: bool = False,
    quiet: bool = True,
    ranks: Ranks | None = None,
) -> Summary:
    """Write the views of some photos and the targets of one base over them.

    Goes on where an earlier run stopped. With ranks (torchrun) or parts, each process does its own units. With
    `fit_only` nothing is written but the settings and the fitted codec. Raises ConfigError, IdentityError,
    SourceError, WeightsError, NonFiniteError, StorageError or CacheError.
    """
    ranks = (ranks or Ranks.from_environment()).with_part(parse_part(config.part))
    quiet = quiet or not ranks.main
    begin = time.monotonic()
    store = open_store(config.cache)
    workers = config.workers or available_cores()
    needed = Needed()
    with explained_storage(store, needed), working(store, dry_run=dry_run) as lock:
        if not ranks.alone and not dry_run:
            store.require_conditional_create()
        cache, views = prepare_cache(config, store, dry_run=dry_run, overwrite=overwrite, ranks=ranks, lock=lock)
        job = None
        if config.base or config.name:
            job = prepare_targets(config, cache, dry_run=dry_run, overwrite=overwrite, ranks=ranks, lock=lock)
        elif fit_only:
            raise ConfigError("no base was named", todo="give --base mae (or another)")
        summary = Summary(config.cache, cache.fingerprint, job.name if job else None, views.num_views)
        coded: Coded | None = None
        with ThreadPoolExecutor(workers, thread_name_prefix="photos") as pool:
            if not dry_run and not fit_only:
                summary.views_made = make_views(cache, views, config.on_error, pool, ranks, needed, quiet)
            if job is not None and not dry_run:
                coded = ensure_codec(cache, job, views, pool, on_error=config.on_error, quiet=quiet)
                if not fit_only:
                    summary.targets_made = make_targets(cache, job, coded, views.num_views, pool, ranks, needed, quiet)
        summary.source_shards = len(cache.shards)
        summary.source_bytes = sum(shard.size for shard in views.shards if isinstance(shard, TarShard))
        if job is not None:
            summary.first_row = job.base.first_row if job.spec.k is not None else ""
            summary.quality, summary.asked_errors = str(job.quality), job.quality.asked
        if job is not None and coded is not None:
            summary.errors = coded.record.errors
            summary.most_bytes_per_target = row_bytes(coded.codec.arrays(job.spec))
        describe(summary, Cache(cache.store, cache.manifest), job)
        summary.seconds = time.monotonic() - begin
        return summary


def make_views(
    cache: Cache,
    views: ViewJob,
    on_error: str,
    pool: ThreadPoolExecutor,
    ranks: Ranks,
    needed: Needed,
    quiet: bool,
) -> int:
    """Cut and commit what is missing of this process's views; return the number of crops written."""
    made = 0
    # how many photos there are is not known before they are read: what is left is told by the shards' sizes, of which
    # a view takes a sixth where photos are ImageNet's, and hardly ever more than all
    known = sum(shard.size for shard in views.shards if isinstance(shard, TarShard))
    needed.begin("views", known, views.num_views)
    with Progress("views", quiet=quiet) as progress:
        for number, shard in enumerate(views.shards):
            before = progress.bytes
            made += ViewsOfShard(cache, number, shard, views, on_error, ranks).make(pool, progress)
            needed.wrote(shard.size, progress.bytes - before)
    return made


def make_targets(
    cache: Cache,
    job: TargetJob,
    coded: Coded,
    num_views: int,
    pool: ThreadPoolExecutor,
    ranks: Ranks,
    needed: Needed,
    quiet: bool,
) -> int:
    """Run the base over every unit of views that has no targets yet; return the number of rows written."""
    cache = Cache(cache.store, cache.manifest)  # a fresh list of units
    store, codec = cache.store, coded.codec
    units = [u for u in cache.view_units if u.view < num_views and ranks.owns(u.shard, u.group, len(cache.shards))]
    done = set(cache[job.name].units)
    left = [unit for unit in units if unit not in done]
    made, total = 0, sum(cache.of_units(left, lambda unit: len(cache.views_record(unit).keys)))
    needed.begin("targets", total, row_bytes(codec.arrays(job.spec)))
    with Progress(f"targets {job.name}", total=total, quiet=quiet) as progress:
        for i, unit in enumerate(left):
            note = f"unit {i + 1} of {len(left)}"
            if store.size(layout.target_record(job.name, unit)) is not None:
                continue  # another job was here meanwhile
            views = cache.views_record(unit)
            arrays = TargetArrays(len(views.keys), codec.arrays(job.spec))
            for rows, targets in base_targets(cache, job, unit, views, pool):
                arrays.add(codec.encode(targets, job.spec))
                progress.advance(len(rows), note=note)
            record = commit_targets(store, job.name, unit, arrays, views, job.fingerprint, coded.sha256)
            size = record.payload.size if record.payload else 0
            progress.advance(0, size, note=note)
            needed.wrote(arrays.count, size)
            made += arrays.count
    return made
