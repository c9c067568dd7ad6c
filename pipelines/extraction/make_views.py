"""Photos to views: each photo of a source shard is decoded once, all missing views of it are cut and committed.

Three stages at the same time: the next group is read while one is cut and the one before is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice

from pipelines.extraction.prepare_views import ViewJob
from pipelines.extraction.tally import CROPS, READING, Tally
from tec_cache.background import Stages, begun_in_order
from tec_cache.cache import layout
from tec_cache.cache.identity import differences
from tec_cache.cache.layout import Unit
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import SourceRecord, hash_photos
from tec_cache.cache.writer import Crop, commit_asked, commit_views
from tec_cache.data.image_pool import ImagePool
from tec_cache.data.image_work import Cutting, Seen
from tec_cache.data.passed_over import PassedOver
from tec_cache.data.photos import Photo, Shard
from tec_cache.data.views import CutPhoto
from tec_cache.distributed import Ranks
from tec_cache.errors import LayoutError, SourceError

RESTORE = "restore the shard as it was, or make a new cache of what it is now"

PHOTOS_TOGETHER = 4
"""Photos that are cut as one task: what a task costs beside its work is then hardly seen."""

TASKS_BEGUN = 2
"""For each worker: enough to keep it busy, and few enough that the stored crops which the pool decodes for the base do
not queue behind a whole group."""

MOST_GROUP_BYTES = 8 << 30
"""Of the photos of a group, which are in memory together: 1,024 photos of 8 MB. ImageNet's take 113 MB."""
TOO_MUCH = f"the photos of its group take more than {MOST_GROUP_BYTES:,} bytes: give a smaller --group-size"


@dataclass(frozen=True)
class Group:
    """Photos of one group as they were read; no photos where the whole shard was finished before."""

    shard: int
    number: int
    photos: list[Photo]
    size: float
    """Its part of the shard's size."""


@dataclass(frozen=True)
class Part:
    """Photos of a group that are cut as one task."""

    group: Group
    numbers: list[int]
    """The views that are missing; none in a group of another rank."""
    photos: list[Photo]
    last: bool
    """Whether they are the group's last ones."""


@dataclass(frozen=True)
class Cut:
    """A group's crops."""

    group: Group
    photos_sha256: str = ""
    """`hash_photos` of all photos of the group; empty where none was read."""
    crops: dict[int, list[Crop]] = field(default_factory=dict)
    """View -> the crops of all whole photos; only views that were missing."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of each broken photo."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """(key, text): what of whole photos was not understood, and not needed."""

    def add(self, photo: Photo, numbers: list[int], views: CutPhoto) -> None:
        """Add the views of a photo, or why there are none."""
        if views.problem:
            self.skipped.append((photo.key, views.problem))
        self.notes.extend((photo.key, text) for text in (photo.note, views.note) if text)
        for view, jpeg in zip(numbers, views.jpegs, strict=False):  # a broken photo has none
            self.crops[view].append(Crop(photo.key, jpeg, photo.label))


@dataclass(frozen=True)
class EndOfShard:
    """A shard was read to its end, or to where it is damaged."""

    shard: int
    photos: int
    damage: SourceError | LayoutError | None
    size: float
    """What no group had of the shard's size."""
    passed_over: dict[str, int]
    """Kind -> how many things in it are no photos."""


@dataclass(frozen=True)
class ViewMaker:
    """The views of this process's groups.

    Memory: the photos of three groups (one being read, one waiting, one being cut), and the crops of three (being cut,
    waiting, being written). 1,024 ImageNet photos take 113 MB, their crops in four views 74 MB: 560 MB in all.
    """

    cache: Cache
    views: ViewJob
    on_error: str
    ranks: Ranks
    pool: ImagePool
    tally: Tally

    def units(self, stages: Stages) -> Iterator[Unit]:
        """Yield each unit of views as soon as it is committed, those that were there before too.

        Errors of the source come in the source's order, when all before them is committed. Raises SourceError.
        """
        if not self.views.shards:  # no photos were given: what is there is all
            units = (unit for unit in self.cache.view_units if unit.view < self.views.num_views)
            return (unit for unit in units if self._mine(unit.shard, unit.group))
        read = stages.ahead(self.read(), 1)
        cut = stages.ahead(self.cut(read, stages), 1)
        return stages.ahead(self.write(cut), self.views.num_views)

    def read(self) -> Iterator[Group | EndOfShard]:
        """Read the photos of every shard that is not finished."""
        for number, shard in enumerate(self.views.shards):
            if self.ranks.by_shard(len(self.cache.shards)) and not self._mine(number, 0):
                self.tally.passed(shard.size)  # another's, who says how many photos it has
                continue
            record = self.cache.source_record(number)
            mine = [group for group in range(record.groups if record else 0) if self._mine(number, group)]
            if record is None or any(self._missing(number, group) for group in mine):
                yield from self._read_shard(number, shard)
            else:
                self.tally.passed(shard.size)
                yield from (Group(number, group, [], 0.0) for group in mine)

    def _read_shard(self, number: int, shard: Shard) -> Iterator[Group | EndOfShard]:
        take = self.cache.identity["source"]["shards"][number].get("take")
        most = self.cache.identity["group_size"]
        photos, size, left = 0, 0.0, float(shard.size)
        damage: SourceError | LayoutError | None = None
        group: list[Photo] = []
        held = 0
        passed_over = PassedOver(self.views.source.passed_over if number == 0 else ())
        try:
            for photo in self.tally.busy.each(READING, islice(shard.photos(passed_over), take)):
                size += len(photo.data) if shard.in_bytes else 1
                held += len(photo.data)
                if held > MOST_GROUP_BYTES:
                    photo = Photo(photo.key, b"", None, TOO_MUCH)
                group.append(photo)
                photos += 1
                if len(group) == most:
                    yield Group(number, (photos - 1) // most, group, size)
                    group, held, size, left = [], 0, 0.0, left - size
        except (SourceError, LayoutError) as error:
            damage = error
        if group and (damage is None or self._skips(damage)):
            yield Group(number, (photos - 1) // most, group, size)
            left -= size
        yield EndOfShard(number, photos, damage, left, passed_over.told())

    def cut(self, groups: Iterable[Group | EndOfShard], stages: Stages) -> Iterator[Cut | EndOfShard]:
        """Hash each photo, decode it once and cut all its missing views; photos of other ranks are only hashed.

        The pool goes on to the next group while it works on the last photos of one.
        """
        hashes: list[tuple[str, int | None, bytes]] = []
        cut: Cut | None = None
        begun = begun_in_order(self._begin, self._parts(groups), TASKS_BEGUN * self.pool.workers)
        for part, every in begun:
            stages.check()
            if isinstance(part, EndOfShard):
                yield part
                continue
            group, numbers = part.group, part.numbers
            cut = cut or Cut(replace(group, photos=[]), crops={number: [] for number in numbers})
            for photo, seen in zip(part.photos, every, strict=True):
                hashes.append((photo.key, photo.label, seen.sha256))
                if numbers:
                    cut.add(photo, numbers, seen.cut)
            if part.last:
                yield replace(cut, photos_sha256=hash_photos(hashes) if hashes else "")
                hashes, cut = [], None

    def _parts(self, groups: Iterable[Group | EndOfShard]) -> Iterator[Part | EndOfShard]:
        for group in groups:
            if isinstance(group, EndOfShard):
                yield group
                continue
            photos, numbers = group.photos, []
            if photos and self._mine(group.shard, group.number):
                numbers = self._missing(group.shard, group.number)
            for begin in range(0, max(1, len(photos)), PHOTOS_TOGETHER):
                end = begin + PHOTOS_TOGETHER
                yield Part(group, numbers, photos[begin:end], last=end >= len(photos))

    def _begin(self, part: Part | EndOfShard) -> Future[list[Seen]]:
        if isinstance(part, EndOfShard) or not part.photos:
            nothing: Future[list[Seen]] = Future()
            nothing.set_result([])
            return nothing
        views = self.views
        name = views.shards[part.group.shard].name
        return self.pool.cut(Cutting(name, views.plan, tuple(part.numbers), views.jpeg), part.photos)

    def write(self, groups: Iterable[Cut | EndOfShard]) -> Iterator[Unit]:
        """Commit a unit for each view, and a record for each shard that is finished."""
        asked, hashes = False, list[str]()
        for cut in groups:
            if isinstance(cut, EndOfShard):
                self._finish_shard(cut, hashes)
                hashes = []
                continue
            shard, number = cut.group.shard, cut.group.number
            if cut.photos_sha256:
                hashes.append(cut.photos_sha256)
                self._require_same_photos(cut)
            if not self._mine(shard, number):
                self.tally.passed(cut.group.size)
                continue
            if cut.skipped and self.on_error == "stop":
                raise broken_photo(*cut.skipped[0], self.views.shards[shard].place)
            if cut.crops and not asked:
                asked = self._ask()
            self.tally.passed(0.0 if cut.crops else cut.group.size, len(cut.skipped))
            for view in range(self.views.num_views):
                unit = Unit(shard, number, view)
                if view in cut.crops:
                    self._commit(unit, cut)
                yield unit
        if not asked:  # nothing was missing but perhaps this
            self._ask()

    def _ask(self) -> bool:
        """Record how many views are asked for; say that it was done."""
        commit_asked(self.cache.store, self.views.num_views, self.cache.fingerprint)
        return True

    def _commit(self, unit: Unit, cut: Cut) -> None:
        crops = cut.crops[unit.view]
        with self.tally.busy.at(CROPS):
            record = commit_views(
                self.cache.store, unit, crops, cut.skipped, self.cache.fingerprint,
                photos_sha256=cut.photos_sha256, notes=cut.notes,
            )  # fmt: skip
        if record.photos_sha256 != cut.photos_sha256:
            raise self._other_photos(cut, f"another job has just made unit {unit} of")
        num_bytes = record.payload.size if record.payload else 0
        self.tally.cut(cut.group.size / len(cut.crops), len(crops), num_bytes)

    def _finish_shard(self, end: EndOfShard, hashes: list[str]) -> None:
        """Record that a shard was read to its end. Raises SourceError where it is damaged, or another than before.

        hashes: of all its groups.
        """
        if end.damage is not None and not self._skips(end.damage):
            raise end.damage
        if self._others_are_at_it(end):
            return  # whoever makes the last unit of the shard records it: one of its photos may still be found broken
        shard, damage = self.views.shards[end.shard], end.damage.what if end.damage else ""
        groups = -(-end.photos // self.cache.identity["group_size"])
        record = SourceRecord(
            shard=shard.name, size=shard.size, ends_sha256=shard.contents.ends_sha256, photos=end.photos,
            groups=groups, damage=damage, passed_over=end.passed_over, group_sha256=hashes,
        )  # fmt: skip
        there = record.create(self.cache.store, layout.source_record(end.shard))
        there = replace(there, passed_over=record.passed_over)  # a note beside the photos changes none of them
        if there != record:
            raise SourceError(
                f"shard {shard.name} has changed since it was first read:",
                where=shard.place,
                todo=RESTORE,
                details=differences(vars(there), vars(record)),
            )
        self.tally.passed(end.size)

    def _others_are_at_it(self, end: EndOfShard) -> bool:
        """Say whether other ranks of this job have units of a shard still to make: they may stop at a photo of it."""
        ranks = self.ranks
        if (
            self.on_error == "skip"
            or ranks.parts > 1
            or ranks.world_size == 1
            or ranks.by_shard(len(self.cache.shards))
        ):
            return False
        groups = -(-end.photos // self.cache.identity["group_size"])
        return any(self._missing(end.shard, group) for group in range(groups))

    def _skips(self, damage: SourceError | LayoutError) -> bool:
        """Say whether damage is to be left out; what would be read wrongly never is."""
        return self.on_error == "skip" and isinstance(damage, SourceError)

    def _mine(self, shard: int, group: int) -> bool:
        return self.ranks.owns(shard, group, len(self.cache.shards))

    def _missing(self, shard: int, group: int) -> list[int]:
        units = [Unit(shard, group, view) for view in range(self.views.num_views)]
        # what was there at the beginning need not be asked for again; what was not may be another job's by now
        known, store = self.cache.view_unit_set, self.cache.store
        return [u.view for u in units if u not in known and store.size(layout.views_record(u)) is None]

    def _require_same_photos(self, cut: Cut) -> None:
        """Refuse a group of other photos than its source shard's record says, or than its views show that are there.

        Views of photos that were exchanged meanwhile would pass for views of one photo.
        """
        shard, number = cut.group.shard, cut.group.number
        source, known = self.cache.source_record(shard), self.cache.view_unit_set
        if source is not None:
            if number >= source.groups or source.group_sha256[number] != cut.photos_sha256:
                raise self._other_photos(cut, "the shard was read to its end with")
            return
        units = (Unit(shard, number, view) for view in range(self.cache.num_views))
        first = next((unit for unit in units if unit in known), None)
        if first is not None and self.cache.views_record(first).photos_sha256 != cut.photos_sha256:
            raise self._other_photos(cut, f"unit {first} was made of")

    def _other_photos(self, cut: Cut, before: str) -> SourceError:
        shard = self.views.shards[cut.group.shard]
        what = f"group {cut.group.number} of shard {shard.name} now holds other photos (or labels): {before} others"
        return SourceError(what, where=shard.place, todo=RESTORE)


def broken_photo(key: str, problem: str, place: str) -> SourceError:
    """Return the error that names a photo that cannot be used."""
    todo = "mend it, or leave broken photos out: --on-error skip"
    return SourceError(f"photo {key!r}: {problem}", where=place, todo=todo)
