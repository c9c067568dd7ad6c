"""Before stage one is paid for: how many bytes and hours, and from when on the cache is the cheaper way.

Every stage of `extract` and `train` runs on a small sample, with their own functions and settings and on the
cache's own disk; the rest is arithmetic (planning/result.py). Nothing of the cache is written.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from pipelines.extraction.label_counts import LabelCounter
from pipelines.extraction.prepare_targets import TargetJob, prepare_targets
from pipelines.extraction.prepare_views import ViewJob, prepare_cache
from pipelines.extraction.sample import MOST_SHARDS, sample_crops
from pipelines.extraction.storage import Needed, explained_storage
from pipelines.planning.amount import Amount, There, amount_left, what_is_there
from pipelines.planning.duration import Duration, expected
from pipelines.planning.extract import (
    MOST_ROWS,
    TargetCosts,
    ViewCosts,
    Written,
    begin_target_set,
    measure_crops,
    measure_targets,
    sample_cache,
    sampled_views,
    scratch,
)
from pipelines.planning.result import Plan
from pipelines.planning.source import cut_sample, look_at_source, number_of_photos, rows_of_a_unit
from pipelines.planning.training import TrainingCosts, measure_training, prepare_training
from tec_cache.cache import layout
from tec_cache.cache.lock import CacheLock
from tec_cache.cache.reader import Cache
from tec_cache.cache.writer import Crop
from tec_cache.config import PlanConfig
from tec_cache.data.image_pool import ImagePool
from tec_cache.device import default_image_workers
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError
from tec_cache.store import open_store

SHARES = {"photos": 0.1, "crops": 0.15, "targets": 0.35, "training": 0.4}
"""Of the seconds for measuring."""


def plan(config: PlanConfig, *, quiet: bool = True) -> Plan:
    """Measure on a sample, and say what an extraction and the trainings after it will take.

    With a cache of the same settings, what is left of it is planned. Raises what `extract` and `train` would:
    ConfigError, IdentityError, SourceError, WeightsError, StorageError.
    """
    extract, begin = config.extract, time.monotonic()
    store = open_store(extract.cache)
    lock, ranks = CacheLock(None, store.url), Ranks()
    with explained_storage(store, Needed()):
        cache, views = prepare_cache(extract, store, dry_run=True, overwrite=False, ranks=ranks, lock=lock, quiet=quiet)
        job = None
        if extract.base or extract.name:
            job = prepare_targets(extract, cache, dry_run=True, overwrite=False, ranks=ranks, lock=lock)
        there = what_is_there(cache, views.num_views, job.name if job else None)
        start = time.monotonic() - begin
        workers = extract.workers or default_image_workers(1)
        with scratch(store) as place, ImagePool(workers) as pool:
            measuring = Measuring(config, cache, views, there, place, pool, workers, quiet)
            amount, costs, targets, training = measuring.run(job)
        fitted = (0, 0)
        if job is not None and store.size(layout.codec_record(job.name)) is None:
            fitted = sampled_views(job, amount.photos * amount.num_views)
    return Plan(
        cache=store.url,
        target=job.name if job else None,
        quality=str(job.quality) if job else "",
        facts=[list(fact) for fact in job.base.facts] if job else [],
        asked_errors=job.quality.asked if job else {},
        labels=LabelCounter().counts(cache.identity),
        passed_over=dict(views.source.passed_over),
        remarks=list(views.source.remarks),
        amount=amount,
        views=costs,
        targets=targets,
        fitted=fitted,
        training=training,
        free=store.free(),
        epochs=config.train.epochs,
        batch_size=config.train.batch_size,
        start=start,
        measured_seconds=time.monotonic() - begin,
        sampled_share=min(1.0, MOST_SHARDS / max(1, len(views.shards))),
    )


@dataclass
class Measuring:
    """A plan's measurements, in the order of the data's way."""

    config: PlanConfig
    cache: Cache
    views: ViewJob
    there: There
    place: str
    pool: ImagePool
    workers: int
    quiet: bool

    def run(self, job: TargetJob | None) -> tuple[Amount, ViewCosts, TargetCosts | None, TrainingCosts | None]:
        """Measure the views and, with a base, the targets and the training."""
        shares = {} if self._all_views_there else {stage: self._seconds(stage) for stage in ("photos", "crops")}
        if job is None:
            self._say(Duration(sum(shares.values())))
            photos, estimated, costs, _, _ = self._views()
            return self._left(photos, estimated, None), costs, None, None
        small = sample_cache(self.cache, f"{self.place}/sample")
        copied = begin_target_set(small, job)
        prepared = prepare_training(self.config.train, small)  # first: it may refuse its settings
        fitted = self.cache.store.size(layout.codec_record(job.name)) is not None
        shares |= {stage: self._seconds(stage) for stage in ("targets", "training")}
        self._say(expected(shares, job, prepared, fitted=fitted))
        photos, estimated, costs, crops, unit_rows = self._views()
        codec = Cache(self.cache.store, self.cache.manifest)[job.name].codec if fitted else None
        seconds, quiet = self._seconds("targets"), self.quiet
        targets = measure_targets(small, copied, crops, codec, unit_rows, self.pool, seconds=seconds, quiet=quiet)
        seconds, small = self._seconds("training"), Cache(small.store, small.manifest)  # with its unit
        training = measure_training(prepared, small, copied, seconds=seconds, quiet=quiet)
        return self._left(photos, estimated, job), costs, targets, training

    @property
    def _all_views_there(self) -> bool:
        return self.there.whole_views >= self.views.num_views

    def _say(self, duration: Duration) -> None:
        if not self.quiet:
            print(f"plan: {duration}", file=sys.stderr, flush=True)

    def _seconds(self, stage: str) -> float:
        return self.config.seconds * SHARES[stage]

    def _left(self, photos: int, estimated: bool, job: TargetJob | None) -> Amount:
        return amount_left(self.there, photos, estimated, self.views.num_views, targets=job is not None)

    def _views(self) -> tuple[int, bool, ViewCosts, list[Crop], int]:
        """Return the number of photos, whether it is estimated, what views cost, some crops, and a unit's rows.

        Where all views are in the cache already, the crops are some of those.
        """
        there = self.there
        if self._all_views_there:
            samples = sample_crops(self.cache, self.views, MOST_ROWS, on_error="stop")
            costs = ViewCosts(0, (), 0.0, 0.0, Written(0.0, there.bytes_per_crop, 0.0))
            crops = [Crop(s.key, s.jpeg, None) for s in samples]
            return there.photos, False, costs, crops, max(1, round(there.crops / len(there.views)))
        extract, quiet = self.config.extract, self.quiet
        source = look_at_source(
            self.cache, self.views, seconds=self._seconds("photos"), count=self.config.images is None,
            on_error=extract.on_error, quiet=quiet,
        )  # fmt: skip
        numbers, seconds = range(there.whole_views, self.views.num_views), self._seconds("crops")
        cut = cut_sample(source, self.views, numbers, self.pool, self.workers, seconds=seconds, quiet=quiet)
        if not cut.crops[0]:
            todo = "see what is wrong with them" + (f": {cut.broken[0]}" if cut.broken else "")
            raise ConfigError("none of the photos can be used", where=str(extract.input), todo=todo)
        photos, estimated = number_of_photos(self.views, source)
        unit_rows = rows_of_a_unit(self.views, source, photos, int(self.cache.identity["group_size"]))
        written = measure_crops(sample_cache(self.cache, f"{self.place}/crops"), cut, unit_rows, quiet=quiet)
        if self.config.images is not None:
            photos, estimated = self.config.images, False
        if extract.on_error == "skip":
            photos = round(photos * len(cut.crops[0]) / cut.tried)
        costs = ViewCosts(cut.tried, tuple(cut.broken), source.seconds_per_photo, cut.seconds_per_photo, written)
        return photos, estimated, costs, cut.mixed(), unit_rows
