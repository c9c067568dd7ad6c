"""The reading half of the cache. Only what has a commit record is there; what is read is checked."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tec_cache.cache.layout import Layout, Unit
from tec_cache.cache.manifest import read_manifest
from tec_cache.cache.record import SourceRecord, TargetRecord, ViewsRecord, hash_file
from tec_cache.codec import Codec, get_codec
from tec_cache.errors import CacheError, ConfigError, listed, nearest
from tec_cache.types import TargetSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from tec_cache.types import Targets


def open_cache(path: str | Path) -> Cache:
    """Open a cache folder. Raises ConfigError where there is none, CacheError where it is damaged."""
    layout = Layout(Path(path))
    if not layout.manifest.is_file():
        raise ConfigError(
            "there is no cache here",
            where=str(path),
            todo="make one: tec-cache extract SHARDS --cache DIR --base mae",
        )
    return Cache(layout, read_manifest(layout.manifest))


@dataclass(frozen=True)
class Cache:
    """The views of a cache and the target sets over them.

    `cache["mae"]` is a target set; `cache.identity` says how the views were made.
    """

    layout: Layout
    manifest: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """View plan, JPEG, grid, group size and source shards."""
        identity: dict[str, Any] = self.manifest["identity"]
        return identity

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return str(self.manifest["fingerprint"])

    @property
    def shards(self) -> list[str]:
        """Names of the source shards."""
        return [shard["name"] for shard in self.identity["source"]["shards"]]

    @property
    def size(self) -> int:
        """Pixels per side of a stored crop."""
        return int(self.identity["views"]["size"])

    @property
    def grid(self) -> int:
        """Patches per side that the crops are meant for."""
        return int(self.identity["grid"])

    @functools.cached_property
    def view_units(self) -> list[Unit]:
        """All committed units of views, sorted; what has no record is not there."""
        return _units(self.layout.root / "records" / "views")

    @functools.cached_property
    def num_views(self) -> int:
        """Views per photo, as far as any unit goes; `require_complete` says whether they are whole."""
        return max((unit.view + 1 for unit in self.view_units), default=0)

    @functools.cached_property
    def target_names(self) -> list[str]:
        """Names of the target sets."""
        return sorted(p.parent.name for p in (self.layout.root / "targets").glob("*/target.json"))

    def __getitem__(self, name: str) -> TargetSet:
        if name not in self.target_names:
            raise ConfigError(
                f"this cache has no target set {name!r}{nearest(name, self.target_names)}",
                where=str(self.layout.root),
                todo=f"it has: {', '.join(self.target_names) or 'none; make one with tec-cache extract --base'}",
            )
        return TargetSet(self, name, read_manifest(self.layout.target_manifest(name)))

    def views_record(self, unit: Unit) -> ViewsRecord:
        """Read the record of a unit of views and check that it belongs to this cache."""
        path = self.layout.views_record(unit)
        record = ViewsRecord.read(path)
        if record.identity != self.fingerprint:
            raise CacheError("a unit of another cache", where=str(path), todo="remove it and extract again")
        return record

    def source_record(self, shard: int) -> SourceRecord | None:
        """Read the record that a source shard was read to its end, if there is one."""
        path = self.layout.source_record(shard)
        return SourceRecord.read(path) if path.exists() else None

    def missing_units(self, num_views: int, target: str | None = None) -> list[Unit]:
        """List the units that are not there; a shard not read to its end stands for its first missing group."""
        folder = self.layout.root / "records" / (f"targets/{target}" if target else "views")
        there = set(_units(folder))
        missing = []
        for shard in range(len(self.shards)):
            record = self.source_record(shard)
            if record is None:
                groups = 1 + max((u.group for u in there if u.shard == shard), default=-1)
                missing.append(Unit(shard, groups, 0))
                continue
            wanted = (Unit(shard, g, v) for g in range(record.groups) for v in range(num_views))
            missing += [unit for unit in wanted if unit not in there]
        return missing

    def require_complete(self, num_views: int, target: str | None = None) -> None:
        """Raise CacheError unless every unit of the first `num_views` views (and of a target set) is there."""
        missing, root = self.missing_units(num_views, target), str(self.layout.root)
        if missing or not self.view_units:
            what = f"target set {target!r}" if target else "the views"
            whole = min((unit.view for unit in missing), default=0)
            todo = "run the same tec-cache extract again, it goes on where it stopped"
            if whole:
                todo += f"; or use the {whole} whole views: --views {whole}"
            raise CacheError(f"{what}: units are missing, {listed(map(str, missing))}", where=root, todo=todo)

    def read_crops(self, unit: Unit, record: ViewsRecord, rows: Sequence[int]) -> list[bytes]:
        """Read the JPEGs of some rows of a unit, each checked against its CRC-32."""
        path = self.layout.views(unit)
        crops = []
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CacheError(
                f"crops are gone: {error.strerror}", where=str(path), todo=_again(self.layout.views_record(unit))
            ) from error
        try:
            for row in rows:
                data = os.pread(handle, record.sizes[row], record.offsets[row])
                if zlib.crc32(data) != record.crc32[row]:
                    raise CacheError(
                        f"crop {record.keys[row]!r} is damaged",
                        where=f"{path}, row {row}",
                        todo=_again(self.layout.views_record(unit)),
                    )
                crops.append(data)
        finally:
            os.close(handle)
        return crops


def _again(record: Path) -> str:
    """Return the remedy for a damaged unit."""
    return f"remove {record} and run the same tec-cache extract again"


@dataclass(frozen=True)
class TargetSet:
    """One base's targets over the views of a cache."""

    cache: Cache
    name: str
    manifest: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """Base, weights, preprocessing, normalization, last layers, k, codec, batch size and threads."""
        identity: dict[str, Any] = self.manifest["identity"]
        return identity

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return str(self.manifest["fingerprint"])

    @functools.cached_property
    def spec(self) -> TargetSpec:
        """What the targets consist of."""
        return TargetSpec(**self.identity["spec"])

    @functools.cached_property
    def codec(self) -> Codec:
        """What decodes them."""
        return get_codec(self.identity["codec"])

    def record(self, unit: Unit, views: ViewsRecord | None = None) -> TargetRecord:
        """Read the record of a unit and check that it belongs to this set and to the views beside it."""
        path = self.cache.layout.target_record(self.name, unit)
        record = TargetRecord.read(path)
        views = views or self.cache.views_record(unit)
        problem = ""
        if record.identity != self.fingerprint:
            problem = "a unit of another target set"
        elif (record.keys_sha256, record.views_sha256) != (views.keys_sha256, views.tar_sha256):
            problem = "these targets were made from other crops"
        if problem:
            raise CacheError(problem, where=str(path), todo=_again(path))
        return record

    def open(self, unit: Unit, views: ViewsRecord | None = None) -> dict[str, Any]:
        """Open the Zarr arrays of a unit for reading by rows.

        Sizes of all files and the SHA-256 of the metadata are checked now, the blocks by their CRC when read.
        views: the record of the unit's views, if it was read already.
        """
        import zarr

        folder = self.cache.layout.targets(self.name, unit)
        for name, (size, sha256) in self.record(unit, views).files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise CacheError(
                    "a file is gone or has another size",
                    where=str(path),
                    todo=_again(self.cache.layout.target_record(self.name, unit)),
                )
            if path.suffix == ".json" and hash_file(path) != sha256:
                raise CacheError(
                    "damaged metadata of an array",
                    where=str(path),
                    todo=_again(self.cache.layout.target_record(self.name, unit)),
                )
        group = zarr.open_group(folder, mode="r")
        return {name: group[name] for name in self.codec.arrays(self.spec)}

    def read(self, arrays: dict[str, Any], start: int, stop: int, unit: Unit) -> dict[str, npt.NDArray[np.generic]]:
        """Read rows start..stop of every array; a damaged block is a CacheError."""
        try:
            return {name: array[start:stop] for name, array in arrays.items()}
        except Exception as error:
            # zarr and numcodecs raise ValueError, RuntimeError and others for a checksum that does not fit
            where = f"{self.cache.layout.targets(self.name, unit)}, rows {start}..{stop}"
            raise CacheError(
                f"damaged targets: {error}", where=where, todo=_again(self.cache.layout.target_record(self.name, unit))
            ) from error

    def decode(self, arrays: dict[str, torch.Tensor]) -> Targets:
        """Decode stored rows, on the device they are on, to normalized float32 targets."""
        return self.codec.decode(arrays, self.spec)


def _units(folder: Path) -> list[Unit]:
    """List the units that have a record in a folder."""
    if not folder.is_dir():
        return []
    names = [p.stem for p in folder.iterdir() if p.suffix == ".json" and not p.name.startswith(".")]
    try:
        return sorted(Unit.parse(name) for name in names)
    except ValueError as error:
        raise CacheError(f"a foreign file among the records: {error}", where=str(folder), todo="remove it") from error
