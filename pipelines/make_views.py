"""Photos to views: each photo of a source shard is decoded once, all missing views of it are cut and committed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from pipelines.prepare import ViewJob
from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import SourceRecord, ViewsRecord, hash_keys
from tec_cache.cache.writer import Crop, commit_views
from tec_cache.data.source import Photo, Shard
from tec_cache.data.views import cut_photo
from tec_cache.distributed import Ranks
from tec_cache.errors import SourceError
from tec_cache.progress import Progress


@dataclass
class ViewsOfShard:
    """The views of one source shard."""

    cache: Cache
    number: int
    shard: Shard
    views: ViewJob
    on_error: str
    ranks: Ranks

    def make(self, pool: ThreadPoolExecutor, progress: Progress) -> int:
        """Cut and commit what is missing; return the number of crops written."""
        if self.ranks.by_shard(len(self.cache.shards)) and not self._mine(0):
            return 0  # another's, who says how many photos it has
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
        there = record.create(self.cache.store, layout.source_record(self.number))
        if there != record:
            raise SourceError(
                f"the shard has changed since the first extraction: {there} then, {record} now",
                where=self.shard.place,
                todo="restore it, or make a new cache",
            )
        return made

    def _mine(self, group: int) -> bool:
        return self.ranks.owns(self.number, group, len(self.cache.shards))

    def _finished(self, record: SourceRecord | None) -> bool:
        """Say whether nothing is left to do, without opening the shard."""
        return record is not None and not any(
            self._missing(group) for group in range(record.groups) if self._mine(group)
        )

    def _missing(self, group: int) -> list[int]:
        units = [Unit(self.number, group, view) for view in range(self.views.num_views)]
        # what was there at the beginning need not be asked for again; what was not may be another job's by now
        known, store = self.cache.view_unit_set, self.cache.store
        return [u.view for u in units if u not in known and store.size(layout.views_record(u)) is None]

    def _commit_group(self, group: int, photos: list[Photo], pool: ThreadPoolExecutor, progress: Progress) -> int:
        """Decode each photo once, cut all missing views, commit a unit for each view."""
        numbers = self._missing(group) if self._mine(group) else []
        if not numbers:
            return 0
        results = list(
            pool.map(lambda p: cut_photo(p, self.shard.name, self.views.plan, numbers, self.views.jpeg), photos)
        )
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
        # the highest view first: how many views a cache has is read off its units, also when this is killed here
        for i, view in reversed(list(enumerate(numbers))):
            crops = [Crop(p.key, jpegs[i], p.label) for p, jpegs in good]
            unit = Unit(self.number, group, view)
            record = commit_views(self.cache.store, unit, crops, skipped, self.cache.fingerprint)
            progress.advance(
                len(crops), record.payload.size if record.payload else 0, f"{len(skipped)} skipped" if skipped else ""
            )
        return len(good) * len(numbers)

    def _check_growth(self, group: int, keys: list[str]) -> None:
        """Refuse to add views of other photos than the views that are there show."""
        store, first = self.cache.store, layout.views_record(Unit(self.number, group, 0))
        if store.size(first) is not None and ViewsRecord.read(store, first).keys_sha256 != hash_keys(keys):
            raise SourceError(
                f"group {group} now holds other photos than when its first view was made",
                where=self.shard.place,
                todo="restore the shard, or make a new cache",
            )
