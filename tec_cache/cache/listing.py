"""Which units have a record, by the names of files alone."""

from __future__ import annotations

from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.store import Store


def units_in(store: Store, folder: str) -> list[Unit]:
    """List the units that have a record in a folder of records."""
    # what is no record is never read, nor removed; an audit names it
    return sorted(unit for name in store.names(folder) if (unit := layout.unit_of(name)) is not None)
