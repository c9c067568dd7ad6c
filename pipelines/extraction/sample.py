"""A sample of the views of a cache: the same whether they are committed already or still to be cut from photos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from pipelines.extraction.make_views import broken_photo
from pipelines.extraction.prepare_views import ViewJob
from tec_cache.cache.layout import Unit
from tec_cache.cache.reader import Cache
from tec_cache.data.photos import Photo
from tec_cache.data.views import cut_photo
from tec_cache.device import available_cores
from tec_cache.errors import SourceError
from tec_cache.rng import key64

MOST_SHARDS = 64
"""Shards that a sample is drawn from. Reading a shard to its end is what a sample costs; each of them gives equally
many photos, so that shards sorted by class give all classes."""

SPARE = 16
"""Photos of a shard kept in memory beyond twice the wanted number, before those that are not wanted are let go."""


class Sample(NamedTuple):
    """One view: where it is from, and its stored crop."""

    shard: str
    key: str
    view: int
    jpeg: bytes


class _Candidate(NamedTuple):
    """A photo of which views can be had."""

    order: int
    shard: str
    key: str
    views: Callable[[list[int]], list[bytes] | None]


def sample_crops(cache: Cache, views: ViewJob, count: int, *, on_error: str) -> list[Sample]:
    """Draw `count` views (fewer where there are not so many) by hash over the source shards.

    A pure function of the source and the view plan: each photo once, in a view drawn by its hash, and only where
    photos are fewer than `count` in further views. Committed views are read, others are cut from their photos: that
    costs reading each of these shards once more, and decoding one to two photos for each view that is drawn.
    Where `on_error` is stop, a damaged shard is a SourceError, and so are broken photos that leave fewer than two.
    """
    seed = views.plan.seed
    chosen = sorted(range(len(cache.shards)), key=lambda i: key64("fit", seed, cache.shards[i]))[:MOST_SHARDS]
    quota = 2 * -(-count // len(chosen))  # more than an even share, for the shards that have fewer
    broken: dict[int, SourceError] = {}

    def candidates(number: int) -> list[_Candidate]:
        if _committed(cache, number, views.num_views):
            return _from_cache(cache, number, views, quota)
        return _from_photos(cache, number, views, quota, on_error, broken)

    with ThreadPoolExecutor(available_cores(), thread_name_prefix="sample") as pool:
        found = [photo for part in pool.map(candidates, chosen) for photo in part]
        photos = sorted(_evenly(found)[:count], key=lambda c: c.order)
        if len(photos) < 2 and broken and on_error == "stop":
            raise broken[min(broken)]
        whole, rest = divmod(count, max(1, len(photos)))

        def samples(place: int) -> list[Sample]:
            photo, wanted = photos[place], min(views.num_views, whole + (place < rest))
            numbers = [(photo.order + i) % views.num_views for i in range(wanted)]
            jpegs = photo.views(numbers) or []
            return [Sample(photo.shard, photo.key, n, jpeg) for n, jpeg in zip(numbers, jpegs, strict=True)]

        return [sample for part in pool.map(samples, range(len(photos))) for sample in part]


def _evenly(found: list[_Candidate]) -> list[_Candidate]:
    """Order photos so that shards take turns: the first of each, then the second of each."""
    turns: Counter[str] = Counter()
    ranked = []
    for photo in sorted(found, key=lambda c: c.order):
        ranked.append((turns[photo.shard], photo.order, photo))
        turns[photo.shard] += 1
    return [photo for _, _, photo in sorted(ranked, key=lambda entry: entry[:2])]


def _committed(cache: Cache, shard: int, num_views: int) -> bool:
    known = cache.view_unit_set
    return shard in cache.groups and all(
        Unit(shard, group, view) in known for group in range(cache.groups[shard]) for view in range(num_views)
    )


def _from_cache(cache: Cache, number: int, views: ViewJob, quota: int) -> list[_Candidate]:
    """List the photos of lowest hash of a shard whose views are all committed."""
    shard = cache.shards[number]
    records = {
        Unit(number, g, v): cache.views_record(Unit(number, g, v))
        for g in range(cache.groups[number])
        for v in range(views.num_views)
    }
    places = [
        (key64("fit", views.plan.seed, shard, key), key, group, row)
        for group in range(cache.groups[number])
        for row, key in enumerate(records[Unit(number, group, 0)].keys)
    ]

    def reader(group: int, row: int) -> Callable[[list[int]], list[bytes]]:
        return lambda numbers: [cache.read_crops(records[Unit(number, group, v)], [row])[0] for v in numbers]

    return [_Candidate(order, shard, key, reader(group, row)) for order, key, group, row in sorted(places)[:quota]]


def _from_photos(
    cache: Cache, number: int, views: ViewJob, quota: int, on_error: str, broken: dict[int, SourceError]
) -> list[_Candidate]:
    """List the photos of lowest hash of a shard that can be read; note the first one that cannot."""
    shard, take = views.shards[number], cache.identity["source"]["shards"][number].get("take")
    # lowest hash first; a photo is decoded, to see whether it can be, only when it may be among the wanted ones
    kept: list[tuple[int, Photo]] = []
    good: set[str] = set()

    def whole(photo: Photo) -> bool:
        if photo.key not in good:
            problem = cut_photo(photo, shard.name, views.plan, [0], views.jpeg).problem
            if problem:
                broken.setdefault(number, broken_photo(photo.key, problem, shard.place))
                return False
            good.add(photo.key)
        return True

    def lowest() -> list[tuple[int, Photo]]:
        pairs = sorted(kept, key=lambda pair: pair[0])
        return list(islice((pair for pair in pairs if whole(pair[1])), quota))

    try:
        for photo in islice(shard.photos(), take):
            if photo.problem:
                broken.setdefault(number, broken_photo(photo.key, photo.problem, shard.place))
            else:
                kept.append((key64("fit", views.plan.seed, shard.name, photo.key), photo))
            if len(kept) > 2 * quota + SPARE:
                kept = lowest()
    except SourceError:
        if on_error == "stop":
            raise

    def cutter(photo: Photo) -> Callable[[list[int]], list[bytes] | None]:
        return lambda numbers: cut_photo(photo, shard.name, views.plan, numbers, views.jpeg).jpegs or None

    return [_Candidate(order, shard.name, photo.key, cutter(photo)) for order, photo in lowest()]
