"""A look at the photos: how many there are, how fast they are read and cut, and some crops of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from pipelines.extraction.prepare_views import ViewJob
from tec_cache.cache.reader import Cache
from tec_cache.cache.writer import Crop
from tec_cache.data.photos import Photo, Shard
from tec_cache.data.views import CutPhoto, cut_photo
from tec_cache.errors import SourceError
from tec_cache.progress import Progress
from tec_cache.rng import key64

SAMPLE = 1024
"""Photos that are held for cutting, at most."""
MOST_SHARDS = 64
"""Shards whose first photos are among them."""
TAR_BLOCK = 512
CHUNK = 32
"""Photos per thread that are cut between two looks at the clock."""


@dataclass
class Source:
    """What a look at the photos told."""

    photos: list[tuple[str, Photo]] = field(default_factory=list)
    """(shard, photo) in random order, broken ones too."""
    known: dict[int, int] = field(default_factory=dict)
    """Photos of each shard that was counted."""
    read: int = 0
    seconds: float = 0.0

    @property
    def seconds_per_photo(self) -> float:
        """Of reading."""
        return self.seconds / self.read if self.read else 0.0


@dataclass(frozen=True)
class Cut:
    """Crops of some photos and what they cost."""

    crops: list[list[Crop]]
    """[view][photo]."""
    seconds_per_photo: float
    """Decoding, cropping and JPEG of all views of a photo, with all threads at work."""
    broken: list[str]
    tried: int
    """Photos, broken ones included."""

    def mixed(self) -> list[Crop]:
        """Return all crops: one of each photo, in another view from photo to photo, then the other views."""
        views, count = len(self.crops), len(self.crops[0])
        return [self.crops[(i + turn) % views][i] for turn in range(views) for i in range(count)]


def look_at_source(cache: Cache, views: ViewJob, *, seconds: float, count: bool, on_error: str, quiet: bool) -> Source:
    """Read the first photos of shards drawn by hash, then count whole shards while there is time.

    count: whether to count beyond what the sample needs. Raises SourceError where the photos are damaged and
    `on_error` is stop.
    """
    source = Source()
    entries = cache.identity["source"]["shards"]
    for number, shard in enumerate(views.shards):
        record, take = cache.source_record(number), entries[number].get("take")
        known = record.photos if record else take if shard.in_bytes else shard.size
        if known is not None:
            source.known[number] = known
    order = sorted(range(len(views.shards)), key=lambda i: key64("fit", views.plan.seed, views.shards[i].name))
    heads = order[:MOST_SHARDS]
    quota = -(-SAMPLE // len(heads))
    with Progress("plan: photos", noun="photo", quiet=quiet) as progress:
        deadline = time.monotonic() + seconds
        for number in heads:
            if source.photos and time.monotonic() > deadline:
                break
            shard, take = views.shards[number], entries[number].get("take")
            photos, seen, whole = _read(shard, take, quota, None, on_error)
            source.photos += [(shard.name, photo) for photo in photos]
            if whole:
                source.known[number] = seen
            progress.advance(seen)
        for number in order:
            if count and number not in source.known and time.monotonic() < deadline:
                _, seen, whole = _read(views.shards[number], None, None, deadline, on_error)
                if whole:
                    source.known[number] = seen
                progress.advance(seen)
        source.read, source.seconds = progress.done, progress.seconds
    source.photos.sort(key=lambda pair: key64("plan", pair[0], pair[1].key))
    return source


def _read(
    shard: Shard, take: int | None, most: int | None, deadline: float | None, on_error: str
) -> tuple[list[Photo], int, bool]:
    """Read a shard: the photos kept, how many were seen, and whether it was read to its end."""
    kept: list[Photo] = []
    seen = 0
    try:
        for photo in islice(shard.photos(), take):
            if (most is not None and seen == most) or (deadline is not None and time.monotonic() > deadline):
                return kept, seen, False
            seen += 1
            if most is not None:
                kept.append(photo)
    except SourceError:
        if on_error == "stop":
            raise
    return kept, seen, True


def number_of_photos(views: ViewJob, source: Source) -> tuple[int, bool]:
    """Return the number of photos, and whether some of it is an estimate by the bytes of the tars."""
    unknown = [shard for number, shard in enumerate(views.shards) if number not in source.known]
    count = sum(source.known.values())
    if not unknown:
        return count, False
    tars = [number for number, shard in enumerate(views.shards) if number in source.known and shard.size]
    if tars and sum(source.known[n] for n in tars):
        per_photo = sum(views.shards[n].size for n in tars) / sum(source.known[n] for n in tars)
    else:
        per_photo = sum(map(_tar_bytes, source.photos)) / max(1, len(source.photos))
    return count + round(sum(shard.size for shard in unknown) / max(per_photo, 1)), True


def rows_of_a_unit(views: ViewJob, source: Source, photos: int, group_size: int) -> int:
    """Return the mean rows of a unit: groups of `group_size`, and what is left at the end of each shard."""
    unknown = len(views.shards) - len(source.known)
    mean = (photos - sum(source.known.values())) / max(1, unknown)
    counts = [*source.known.values(), *[round(mean)] * unknown]
    return max(1, round(sum(counts) / max(1, sum(-(-count // group_size) for count in counts))))


def _tar_bytes(named: tuple[str, Photo]) -> int:
    """Return the bytes of a photo in a tar, as far as one can see: header and content, the same for its label."""
    photo = named[1]
    content = -(-len(photo.data) // TAR_BLOCK) * TAR_BLOCK
    return TAR_BLOCK + content + (2 * TAR_BLOCK if photo.label is not None else 0)


def cut_sample(
    source: Source, views: ViewJob, numbers: Sequence[int], pool: ThreadPoolExecutor, workers: int, *, seconds: float,
    quiet: bool,
) -> Cut:  # fmt: skip
    """Cut views `numbers` of as many photos as the time allows, as `extract` does it."""

    def cut(named: tuple[str, Photo]) -> CutPhoto:
        return cut_photo(named[1], named[0], views.plan, numbers, views.jpeg)

    list(pool.map(cut, source.photos[:workers]))  # the first ones load decoders
    crops: list[list[Crop]] = [[] for _ in numbers]
    broken: list[str] = []
    step = CHUNK * workers
    with Progress("plan: crops", noun="photo", quiet=quiet) as progress:
        for start in range(0, len(source.photos), step):
            part = source.photos[start : start + step]
            for (shard, photo), (jpegs, problem, _) in zip(part, pool.map(cut, part), strict=True):
                if problem:
                    broken.append(f"{shard} {photo.key}: {problem}")
                for view, jpeg in enumerate(jpegs):
                    crops[view].append(Crop(photo.key, jpeg, photo.label))
            progress.advance(len(part))
            if progress.seconds > seconds:
                break
        return Cut(crops, progress.seconds / max(1, progress.done), broken, progress.done)
