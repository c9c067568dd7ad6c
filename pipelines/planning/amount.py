"""How much of an extraction is left to do."""

from __future__ import annotations

from dataclasses import dataclass

from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.listing import units_in
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import ViewsRecord


@dataclass(frozen=True)
class There:
    """What a cache holds of the wanted views and targets."""

    views: dict[Unit, ViewsRecord]
    targets: int
    """Rows of the target set."""
    whole_views: int
    """Leading views of which no unit is missing."""
    num_bytes: int
    """Of payloads, records and indices."""

    @property
    def photos(self) -> int:
        """Photos of the first view."""
        return sum(len(record.keys) for unit, record in self.views.items() if unit.view == 0)

    @property
    def crops(self) -> int:
        """Committed crops."""
        return sum(len(record.keys) for record in self.views.values())

    @property
    def bytes_per_crop(self) -> float:
        """Of the committed ones."""
        return sum(r.payload.size for r in self.views.values() if r.payload) / max(1, self.crops)


@dataclass(frozen=True)
class Amount:
    """How much there is to do."""

    photos: int
    estimated: bool
    """Whether photos were counted in part and extrapolated by the bytes of the tars."""
    num_views: int
    photos_to_cut: int
    crops_left: int
    targets_left: int
    bytes_there: int


def what_is_there(cache: Cache, num_views: int, target: str | None) -> There:
    """Look at the records of a cache that may not exist yet."""
    units = [unit for unit in cache.view_units if unit.view < num_views]
    records = dict(zip(units, cache.views_records(units), strict=True))
    whole = 0
    while units and whole < num_views and not cache.missing_units(whole + 1):
        whole += 1
    done = [u for u in units_in(cache.store, layout.target_records(target)) if u in records] if target else []
    folders = (layout.RECORDS, layout.VIEWS, layout.TARGETS, layout.INDEX)
    names = [name for folder in folders for name in cache.store.names(folder)]
    return There(
        views=records,
        targets=sum(len(records[unit].keys) for unit in done),
        whole_views=whole,
        num_bytes=sum(cache.store.size(name) or 0 for name in names) if units else 0,
    )


def amount_left(there: There, photos: int, estimated: bool, num_views: int, *, targets: bool) -> Amount:
    """Subtract what is there from what is wanted."""
    wanted = photos * num_views
    missing_views = num_views - there.whole_views
    crops = max(0, wanted - there.crops) if missing_views else 0
    return Amount(
        photos=photos,
        estimated=estimated,
        num_views=num_views,
        photos_to_cut=round(crops / missing_views) if missing_views else 0,
        crops_left=crops,
        targets_left=max(0, wanted - there.targets) if targets else 0,
        bytes_there=there.num_bytes,
    )
