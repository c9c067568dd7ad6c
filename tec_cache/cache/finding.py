"""Samples found again: from a key to where its crops and targets lie, and from a batch's hashes to keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.pixels import decode_crop
from tec_cache.errors import CacheError, ConfigError, nearest
from tec_cache.printable import are, counted
from tec_cache.rng import key64

if TYPE_CHECKING:
    from tec_cache.cache.reader import Cache
    from tec_cache.types import Targets


class SampleName(NamedTuple):
    """A photo's name in its source."""

    shard: str
    """Name of the source shard."""
    key: str
    """Key of the photo within the shard."""


@dataclass(frozen=True)
class Sample:
    """One view of a photo: where it is in a cache, and what is stored about it."""

    cache: Cache
    unit: Unit
    row: int
    """The view's row in its unit: the number of its crop in the tar, and of its targets in each array."""
    name: SampleName
    label: int | None

    def crop(self) -> bytes:
        """Read its JPEG. Raises CacheError if it is damaged."""
        (data,) = self.cache.read_crops(self.cache.views_record(self.unit), [self.row])
        return data

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return its crop, (S, S, 3) RGB, where S is the cache's size. Raises CacheError if it is damaged."""
        return decode_crop(self.crop())

    def targets(self, name: str) -> Targets:
        """Return its decoded targets from a set: float32, a batch of one, on the CPU.

        Raises ConfigError if there is no such set or it has no targets for this view yet, CacheError for damage.
        """
        import torch

        target = self.cache[name]
        if self.unit not in target.units:
            todo = f"run tec-cache extract for {name} again, it goes on"
            raise ConfigError(f"target set {name!r} has no targets of unit {self.unit} yet", todo=todo)
        block, row = divmod(self.row, BLOCK_ROWS)
        arrays = target.read_block(target.record(self.unit), block)
        return target.decode({part: torch.from_numpy(rows[row : row + 1].copy()) for part, rows in arrays.items()})

    def view(self, number: int) -> Sample:
        """Return another view of the same photo. Raises ConfigError if it is not stored."""
        return _in_unit(self.cache, self.unit._replace(view=number), self.name)


def find(cache: Cache, key: str, *, view: int = 0, shard: str | None = None) -> Sample:
    """Return the sample of a photo's key: see `Cache.find`."""
    shards = {name: number for number, name in enumerate(cache.shards)}
    if shard is not None and shard not in shards:
        raise ConfigError(f"no source shard {shard!r}{nearest(shard, shards)}", where=cache.store.url)
    wanted = {shards[name]: key64("sample", name, key) for name in (shards if shard is None else [shard])}
    units = [unit for unit in cache.view_units if unit.view == 0 and unit.shard in wanted]
    places = cache.of_units(units, lambda unit: unit if wanted[unit.shard] in _hashes(cache, unit) else None)
    found = [unit for unit in places if unit is not None]
    if not found:
        there = nearest(key, _some_keys(cache, units[:1]))
        where = "" if shard is None else f" in {shard}"
        todo = "give a key as the source has it: a tar's without the suffix of its file, a folder's with it"
        raise ConfigError(f"no photo with the key {key!r}{where}{there}", where=cache.store.url, todo=todo)
    if len(found) > 1:
        several = ", ".join(cache.shards[unit.shard] for unit in found[:3])
        what = f"{len(found)} shards have a photo with the key {key!r}: {several}{', ...' if len(found) > 3 else ''}"
        raise ConfigError(what, where=cache.store.url, todo="name one with shard=")
    unit = found[0]
    return _in_unit(cache, unit._replace(view=view), SampleName(cache.shards[unit.shard], key))


def names_of(cache: Cache, sample_keys: Iterable[int]) -> list[SampleName]:
    """Return shard and key of samples that a batch knows by their hash, in the order given.

    Reads where samples lie until all are found: an index tells in which units, so that few records are opened. Raises
    CacheError where the cache has none with such a hash.
    """
    wanted = np.fromiter((int(key) for key in sample_keys), np.uint64)
    left, named = set(wanted.tolist()), dict[int, SampleName]()
    units = [unit for unit in cache.view_units if unit.view == 0]
    for start in range(0, len(units), UNITS_AT_ONCE):
        if not left:
            break
        part = units[start : start + UNITS_AT_ONCE]
        for unit, hashes in zip(part, cache.of_units(part, lambda unit: _hashes(cache, unit)), strict=True):
            rows = np.flatnonzero(np.isin(hashes, wanted))
            if len(rows):
                keys, shard = cache.views_record(unit).keys, cache.shards[unit.shard]
                named |= {int(hashes[row]): SampleName(shard, keys[row]) for row in rows}
                left -= set(hashes[rows].tolist())
    if left:
        raise CacheError(
            f"{counted(len(left), 'sample')} {are(len(left))} of no photo of this cache", where=cache.store.url
        )
    return [named[key] for key in wanted.tolist()]


UNITS_AT_ONCE = 256
"""Units of which it is known at a time which samples they have: 1,024 hashes each."""


def _hashes(cache: Cache, unit: Unit) -> npt.NDArray[np.uint64]:
    """Return (rows,) the hashes of a unit's samples: from the index where there is one, else from its record."""
    from tec_cache.cache.index.details import CROP
    from tec_cache.cache.index.reading import StaleIndex

    if cache.index is not None and not cache.packed:
        try:
            hashes: npt.NDArray[np.uint64] = cache.index.details(cache.index.find(unit), CROP)["sample_key"]
            return hashes
        except (StaleIndex, OSError):
            pass  # the record says it too
    shard = cache.shards[unit.shard]
    return np.array([key64("sample", shard, key) for key in cache.views_record(unit).keys], np.uint64)


def _in_unit(cache: Cache, unit: Unit, name: SampleName) -> Sample:
    """Return a sample of a unit."""
    if unit not in cache.view_unit_set:
        todo = f"the cache has {counted(cache.num_views, 'view')}, from 0 on"
        raise ConfigError(f"view {unit.view} of {name.key!r} is not stored", where=cache.store.url, todo=todo)
    record = cache.views_record(unit)
    row = record.keys.index(name.key)
    return Sample(cache, unit, row, name, record.labels[row])


def _some_keys(cache: Cache, units: list[Unit]) -> list[str]:
    return [key for unit in units for key in cache.views_record(unit).keys]
