"""From the members of a tar to samples: which of them belong together, and which of them is the image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from tec_cache.data.photos import IMAGE_SUFFIXES, Extent
from tec_cache.errors import LayoutError

LONG_RUN = 256
"""Members with one and the same beginning that are held at a time, where each photo has a further part of its own: a
shard of img.0001.jpg, img.0002.jpg, ... begins the same to its end."""
LONGEST_RUN = 1024
"""Members that any other sample may have."""

TWICE = "its key appears twice in the shard"


@lru_cache(maxsize=LONGEST_RUN)
def split_name(name: str) -> tuple[str, str]:
    """Return WebDataset's key and field, the latter in lower case; both are empty of a name without a suffix.

    A name is asked for ten times while its sample is put together.
    """
    key, suffix = base_plus_ext(name)
    return key or "", (suffix or "").lower()


class Member(NamedTuple):
    """A file of a tar."""

    name: str
    data: bytes
    problem: str = ""
    """Why its bytes cannot be had; then there are none."""
    extent: Extent | None = None
    """Where they are, of a member of a plain tar whose bytes were not wanted."""

    @property
    def stem(self) -> str:
        """WebDataset's key: the name up to the first dot of its last part."""
        return split_name(self.name)[0] or self.name

    @property
    def field(self) -> str:
        """What follows the key's dot, in lower case."""
        return split_name(self.name)[1]

    @property
    def part(self) -> str:
        """What the field has before its suffix: 'input' of KEY.input.jpg, nothing of KEY.jpg."""
        return self.field.rpartition(".")[0]

    @property
    def is_image(self) -> bool:
        """Whether its suffix is one of an image."""
        return self.field.rpartition(".")[2] in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Sample:
    """Members that are one sample."""

    key: str
    fields: dict[str, Member]
    """Field -> member."""
    image: Member | None = None
    """Which of them is the photo."""
    beside: list[Member] = field(default_factory=list)
    """Images that are not the photo, and what is named after them."""
    problem: str = ""
    """Why it cannot be used."""


class Keys:
    """The keys that a shard has had, to tell a photo that comes twice from a sample whose members lie apart."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._images: dict[str, str | None] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._images

    def part(self, key: str) -> str | None:
        """Return the part (`Member.part`) of the image that was noted under a key; None where there is none."""
        return self._images.get(key)

    def add(self, key: str, members: list[Member]) -> bool:
        """Note members that lie side by side; say whether the key is new.

        Raises LayoutError where a sample's image is here and the rest of it elsewhere, or the other way round.
        """
        part = next((member.part for member in members if member.is_image), None)
        if key not in self._images:
            self._images[key] = part
            return True
        if (self._images[key] is None) != (part is None):
            raise LayoutError(
                f"the members of sample {key!r} do not lie side by side: {members[0].name!r} is apart from the others, "
                "and a photo would lose its label",
                where=self._place,
                todo="pack the files again in the order of their names: tar --sort=name -cf SHARD.tar -C FOLDER .",
            )
        return False


def samples(members: Iterable[Member], place: str) -> Iterator[Sample]:
    """Group the members of a shard as WebDataset does: those side by side that agree up to the first dot.

    Members without a suffix belong to no sample and must be left out before. Where several photos agree that far,
    `n01.5_x.jpg` and `n01.6_y.jpg`, they are told apart by what follows. Raises LayoutError.
    """
    grouper = _Grouper(place)
    for member in members:
        yield from grouper.take(member)
    yield from grouper.end()


class _Grouper:
    """Takes members one at a time and gives samples as soon as they are whole."""

    def __init__(self, place: str) -> None:
        self._place, self._keys = place, Keys(place)
        self._run: list[Member] = []
        self._several = False
        """Whether the run is known to be several photos, those before being given already."""

    def take(self, member: Member) -> Iterator[Sample]:
        """Add a member; give what is whole by then."""
        if self._run and member.stem != self._run[0].stem:
            yield from self.end()
        self._run.append(member)
        if len(self._run) % LONG_RUN == 0:
            last = self._run[-1].part
            whole = next((i + 1 for i in reversed(range(len(self._run))) if self._run[i].part != last), 0)
            if self._several or are_several(self._run[:whole]):
                given, self._run = self._run[:whole], self._run[whole:]
                yield from self._of_several(given)
        if len(self._run) >= LONGEST_RUN:
            raise LayoutError(
                f"{LONGEST_RUN:,} files and more share the key {member.stem!r}: a key ends at the first dot",
                where=self._place,
                todo="name the files so that no two photos agree up to the first dot",
            )

    def end(self) -> Iterator[Sample]:
        """Give what is left of the run."""
        run, self._run = self._run, []
        if run and (self._several or are_several(run)):
            yield from self._of_several(run)
        elif run:
            yield from self._of_one(run)
        self._several = False

    def _of_several(self, run: list[Member]) -> Iterator[Sample]:
        """Split a run, or a part of it, into samples by what stands before the suffix."""
        if not self._several and run:
            self._keys.add(run[0].stem, run)
            self._several = True
        for key, group in groupby(run, key=lambda member: member.name.rpartition(".")[0]):
            members = list(group)
            yield from _samples_of(key, members, new=self._keys.add(key, members))

    def _of_one(self, run: list[Member]) -> Iterator[Sample]:
        """Make a run one sample (or more, where a field is repeated)."""
        key = run[0].stem
        before = self._keys.part(key)
        new = self._keys.add(key, run)
        fields = {member.field: member for member in run if member.is_image}
        if not new and len(fields) == 1:
            (image,) = fields.values()
            longer = image.name.rpartition(".")[0]
            if image.part and (image.part != before or longer in self._keys):
                key, new = longer, self._keys.add(longer, run)
        yield from _samples_of(key, run, new=new)


def are_several(run: list[Member]) -> bool:
    """Say whether members that agree up to the first dot are photos of their own, and not fields of one sample.

    Fields have words for names (left.jpg, right.jpg, output.cls); names of photos go on with a number.
    """
    parts = {member.part for member in run}
    images = {member.part for member in run if member.is_image}
    return len(images) > 1 and all(any(c.isdigit() for c in part) for part in parts)


def _samples_of(key: str, members: list[Member], *, new: bool) -> Iterator[Sample]:
    """Make a sample of members; a field that comes twice begins another one under the same key."""
    every: list[dict[str, Member]] = [{}]
    for member in members:
        if member.field in every[-1]:
            every.append({})
        every[-1][member.field] = member
    for number, fields in enumerate(every):
        yield _sample(key, fields, "" if new and number == 0 else TWICE)


def _sample(key: str, fields: dict[str, Member], problem: str) -> Sample:
    """Choose the image of a sample: the plain field where there is one (KEY.jpg beside KEY.seg.png), else the only."""
    images = [member for member in fields.values() if member.is_image]
    chosen = [member for member in images if not member.part] or images
    if len(chosen) > 1:
        names = ", ".join(sorted(member.field for member in chosen))
        return Sample(key, fields, problem=problem or f"more than one image ({names})")
    if not chosen:
        return Sample(key, fields)
    image = chosen[0]
    others = {member.part for member in images} - {image.part}
    beside = [member for member in fields.values() if member.part in others]
    own = {name: member for name, member in fields.items() if member.part not in others}
    return Sample(key, own, image, beside, problem or image.problem)
