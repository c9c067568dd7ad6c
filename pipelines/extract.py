"""Stage one: photos -> views -> base -> targets -> cache. Paid once."""

from __future__ import annotations

import time

from pipelines.extraction.extract_summary import Summary, describe, require_photos, row_bytes
from pipelines.extraction.fit import Coded, ensure_codec
from pipelines.extraction.make_targets import TargetMaker
from pipelines.extraction.make_views import ViewMaker
from pipelines.extraction.prepare_targets import TargetJob, prepare_targets
from pipelines.extraction.prepare_views import ViewJob, prepare_cache
from pipelines.extraction.storage import Needed, explained_storage
from pipelines.extraction.tally import Tally
from tec_cache.background import Stages
from tec_cache.cache.index.writing import forget_stale, refresh
from tec_cache.cache.reader import Cache
from tec_cache.cache.remove import foreign_files, working
from tec_cache.cache.writer import commit_content
from tec_cache.config import ExtractConfig, parse_part
from tec_cache.data.image_pool import ImagePool
from tec_cache.device import default_image_workers
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
    needed = Needed()
    with explained_storage(store, needed), working(store, dry_run=dry_run) as lock:
        if not ranks.alone and not dry_run:
            store.require_conditional_create()
        cache, views = prepare_cache(
            config, store, dry_run=dry_run, overwrite=overwrite, ranks=ranks, lock=lock, quiet=quiet
        )
        job = None
        if config.base or config.name:
            job = prepare_targets(config, cache, dry_run=dry_run, overwrite=overwrite, ranks=ranks, lock=lock)
        elif fit_only:
            raise ConfigError("no base was named", todo="give --base mae (or another)")
        summary = Summary(store.url, cache.fingerprint, job.name if job else None, views.num_views)
        coded: Coded | None = None
        with ImagePool(config.workers or default_image_workers(ranks.local_world_size)) as pool:
            # First, so that targets can be made of each view as soon as it is cut. In a fresh cache that costs reading
            # up to 64 source shards once more, a twentieth of ImageNet's, and cutting the sample's 640 views twice.
            if job is not None and not dry_run:
                coded = ensure_codec(cache, job, views, pool, on_error=config.on_error, ranks=ranks, quiet=quiet)
            if not dry_run and not fit_only:
                forget_stale(cache.again(), job.name if job else None)
                made = make_views_and_targets(config, cache, views, job, coded, pool, ranks, needed, quiet)
                summary.views_made, summary.targets_made = made.views_made, made.targets_made
                summary.making_seconds, summary.busy = made.busy.seconds, made.shares
                commit_content(cache)
                with Progress("index", noun="unit", quiet=quiet) as progress:
                    refresh(cache.again(), progress)
        summary.source_shards = len(cache.shards)
        summary.source_files = any(not shard.in_bytes for shard in views.shards)
        summary.source_bytes = sum(shard.size for shard in views.shards if shard.in_bytes)
        if job is not None:
            summary.first_row = job.base.first_row if job.spec.k is not None else ""
            summary.facts = [list(fact) for fact in job.base.facts]
            summary.quality, summary.asked_errors = str(job.quality), job.quality.asked
            summary.computed = job.computed
        if job is not None and coded is not None:
            summary.errors = coded.record.errors
            summary.checked_views = coded.record.checked_views
            summary.most_bytes_per_target = row_bytes(coded.codec.arrays(job.spec))
        describe(summary, cache.again(), job, views.source)
        if ranks.alone and not dry_run and not fit_only:
            require_photos(summary, config.input)
        if overwrite and not dry_run:
            summary.foreign = foreign_files(store)
        summary.seconds = time.monotonic() - begin
        return summary


def make_views_and_targets(
    config: ExtractConfig,
    cache: Cache,
    views: ViewJob,
    job: TargetJob | None,
    coded: Coded | None,
    pool: ImagePool,
    ranks: Ranks,
    needed: Needed,
    quiet: bool,
) -> Tally:
    """Cut and commit what is missing of this process's views, and run the base over each unit as soon as it is there.

    All stages work at the same time, each in a thread of its own and the base in this one:

        read -> cut -> write crops -> read and decode crops -> base -> code -> write targets

    Whatever goes wrong in one stops the others; each finishes the unit that it is writing.
    """
    title = "views" if job is None else f"targets {job.name}"
    with Progress(title, quiet=quiet) as progress, Stages() as stages:
        fresh = Cache(cache.store, cache.manifest)
        needed.source_left = float(sum(shard.size for shard in views.shards))
        # a view takes a sixth of a tar's bytes where photos are ImageNet's, and hardly ever more than all
        needed.most_per_size = views.num_views if any(shard.in_bytes for shard in views.shards) else 0
        if job is not None and coded is not None:
            needed.most_per_target = row_bytes(coded.codec.arrays(job.spec))
            needed.targets_left = _rows_without_targets(fresh, job, views.num_views, ranks)
        tally = Tally(progress, needed, pool, targets=job is not None)
        units = ViewMaker(cache, views, config.on_error, ranks, pool, tally).units(stages)
        if job is not None and coded is not None:
            TargetMaker(fresh, job, coded, pool, tally).make(units, stages)
        else:
            for _ in units:
                pass
    return tally


def _rows_without_targets(cache: Cache, job: TargetJob, num_views: int, ranks: Ranks) -> int:
    """Count this process's crops that are there and have no targets yet."""
    done = set(cache.committed(job.name))
    mine = (u for u in cache.view_units if u.view < num_views and ranks.owns(u.shard, u.group, len(cache.shards)))
    left = [unit for unit in mine if unit not in done]
    return sum(cache.of_units(left, lambda unit: len(cache.views_record(unit).keys)))
