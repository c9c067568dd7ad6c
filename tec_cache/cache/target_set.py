"""The reading half of a cache: one base's targets over its views."""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from tec_cache.cache import layout
from tec_cache.cache.blocks import most_chunk_bytes, read_block
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.places import TargetPlaces
from tec_cache.cache.ranges import require_ranges, unreadable
from tec_cache.cache.record import MEND, CodecRecord, TargetRecord, ViewsRecord
from tec_cache.codec import ArraySpec, Codec, get_codec, most_parameter_bytes
from tec_cache.errors import CacheError
from tec_cache.types import TargetSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from tec_cache.cache.index.heading import TargetsHeading
    from tec_cache.cache.index.reading import UnitIndex
    from tec_cache.cache.reader import Cache
    from tec_cache.types import Targets

RESTORE = "restore it from a copy, or give the target set up (tec-cache rm CACHE --target NAME) and extract it again"


@dataclass(frozen=True)
class TargetSet:
    """One base's targets over the views of a cache."""

    cache: Cache
    name: str
    manifest: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """How the targets were made: base, weights, preprocessing, normalization, k, codec, batch size and threads."""
        identity: dict[str, Any] = self.manifest["identity"]
        return identity

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return str(self.manifest["fingerprint"])

    @functools.cached_property
    def spec(self) -> TargetSpec:
        """Grid, widths, heads, k and normalization of the targets."""
        return TargetSpec(**self.identity["spec"])

    @functools.cached_property
    def units(self) -> list[Unit]:
        """The units that have targets, sorted."""
        return self.cache.committed(self.name)

    @functools.cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """Name, shape and dtype of each stored array."""
        return self.codec.arrays(self.spec)

    @functools.cached_property
    def _opened_index(self) -> tuple[UnitIndex[TargetsHeading] | None, str]:
        from tec_cache.cache.index.reading import open_targets_index, opened

        return opened(lambda: open_targets_index(self)) if self.cache.only is None else (None, "")

    @property
    def index(self) -> UnitIndex[TargetsHeading] | None:
        """The index of the set's units, if there is a valid one; None if the records have to be read instead."""
        return self._opened_index[0]

    @property
    def index_problem(self) -> str:
        """Why there is no usable index although there is an index file; empty otherwise."""
        return self._opened_index[1]

    def require_complete(self, num_views: int) -> None:
        """Raise CacheError unless every unit of the first `num_views` views is there."""
        if self.index is None or self.index.heading.num_views < num_views:
            self.cache.require_complete(num_views, self.name)

    def whole_views(self) -> int:
        """Return the number of views, counted from the first, that have targets in all of their units."""
        there, whole = Counter(unit.view for unit in self.units), 0
        groups = sum(self.cache.groups.values())
        while groups and there[whole] == groups:
            whole += 1
        return whole

    @property
    def fitted(self) -> bool:
        """Whether the set's codec was fitted; until then the set has no units."""
        return self.cache.store.size(layout.codec_record(self.name)) is not None

    @functools.cached_property
    def codec_record(self) -> CodecRecord:
        """The codec's record, with its measured errors. Raises CacheError if the codec was never fitted."""
        store, name = self.cache.store, layout.codec_record(self.name)
        if store.size(name) is None:
            todo = "run the same tec-cache extract again"
            raise CacheError(f"target set {self.name!r} has no codec yet", where=store.place(name), todo=todo)
        try:
            record = CodecRecord.read(store, name)
        except CacheError as error:  # no repair drops it: the units that are there need it
            raise CacheError(error.what, where=error.where, todo=RESTORE) from error
        if record.identity != self.fingerprint:
            raise CacheError("the codec of another target set", where=store.place(name), todo=RESTORE)
        return record

    @functools.cached_property
    def codec(self) -> Codec:
        """The codec that decodes the stored arrays."""
        payload, store = self.codec_record.payload, self.cache.store
        parameters = None
        if payload is not None:
            where, most = store.place(payload.name), most_parameter_bytes(self.spec)
            require_ranges([(0, payload.size)], payload, most, where, RESTORE)
            try:
                parameters = store.read(payload.name)
            except OSError as error:
                raise unreadable("the codec's parameters", store.place(payload.name), error) from error
            if sha256(parameters).hexdigest() != payload.sha256:
                raise CacheError("the codec's parameters are damaged", where=store.place(payload.name), todo=RESTORE)
        return get_codec(self.identity["codec"], parameters)

    def record(self, unit: Unit, views: ViewsRecord | None = None) -> TargetRecord:
        """Read the record of a unit and check that it belongs to this set and to the views beside it.

        views: the record of the unit's views, if it was read already.
        """
        store, name = self.cache.store, layout.target_record(self.name, unit)
        record = TargetRecord.read(store, name)
        views = views or self.cache.views_record(unit)
        codec = self.codec_record.payload
        problem = ""
        if record.identity != self.fingerprint:
            problem = "a unit of another target set"
        elif record.codec_sha256 != (codec.sha256 if codec else ""):
            problem = "these targets were coded with other parameters"
        elif (record.count, record.keys_sha256, record.views_sha256) != (
            len(views.keys),
            views.keys_sha256,
            views.payload.sha256 if views.payload else "",
        ):
            problem = "these targets were made from other crops"
        if problem:
            raise CacheError(problem, where=store.place(name), todo=MEND)
        return record

    def read_block(self, record: TargetPlaces, number: int) -> dict[str, npt.NDArray[np.generic]]:
        """Read block `number` of a unit: array -> (rows, ...), rows = BLOCK_ROWS or what is left at the end."""
        if record.payload is None:
            return {}
        store, name, specs = self.cache.store, record.payload.name, self.arrays
        rows = min(BLOCK_ROWS, record.count - number * BLOCK_ROWS)
        if set(record.blocks) != set(specs):
            what = f"its record has the arrays {sorted(record.blocks)}, the codec has {sorted(specs)}"
            raise CacheError(what, where=store.place(name), todo=MEND)
        places = {array: blocks[number] for array, blocks in record.blocks.items()}
        for array, (offset, size, _) in places.items():
            require_ranges([(offset, size)], record.payload, most_chunk_bytes(specs[array]), store.place(name), MEND)
        try:
            pieces = store.read_ranges(name, [(offset, size) for offset, size, _ in places.values()])
        except OSError as error:
            raise unreadable("targets", store.place(name), error) from error
        arrays = {}
        for (array, (_, _, crc)), data in zip(places.items(), pieces, strict=True):
            where = f"{store.place(name)}, {array}, rows from {number * BLOCK_ROWS}"
            if zlib.crc32(data) != crc:
                if store.drop_copy(name):
                    return self.read_block(record, number)
                raise CacheError("damaged targets", where=where, todo=MEND)
            try:
                arrays[array] = read_block(data, specs[array])[:rows]
            except ValueError as error:
                raise CacheError(f"damaged targets: {error}", where=where, todo=MEND) from error
        return arrays

    def read_unit(self, record: TargetRecord) -> dict[str, npt.NDArray[np.generic]]:
        """Read all rows of a unit: array -> (count, ...)."""
        import numpy as np

        blocks = [self.read_block(record, number) for number in range(-(-record.count // BLOCK_ROWS))]
        return {name: np.concatenate([block[name] for block in blocks]) for name in record.blocks}

    def decode(self, arrays: dict[str, torch.Tensor]) -> Targets:
        """Decode stored rows, on the device they are on, to normalized float32 targets."""
        return self.codec.decode(arrays, self.spec)
