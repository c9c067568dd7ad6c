"""The writing half of the cache: payload first, synced, under a temporary name; then the record."""

from __future__ import annotations

import os
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import webdataset as wds

from tec_cache.cache.layout import BLOCK_ROWS, Layout, Unit, crop_name
from tec_cache.cache.record import (
    TargetRecord,
    ViewsRecord,
    hash_file,
    hash_keys,
    sync_folder,
    temporary,
)
from tec_cache.codec import ArraySpec

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class Crop:
    """One crop to be stored."""

    key: str
    jpeg: bytes
    label: int | None


@dataclass
class TargetArrays:
    """The arrays of one unit, filled batch by batch."""

    count: int
    specs: dict[str, ArraySpec]
    arrays: dict[str, npt.NDArray[np.generic]] = field(init=False)
    filled: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.arrays = {name: np.empty((self.count, *s.shape), s.dtype) for name, s in self.specs.items()}

    def add(self, batch: dict[str, npt.NDArray[np.generic]]) -> None:
        """Append a batch of rows; its arrays must be exactly the declared ones."""
        if {n: (a.shape[1:], a.dtype.name) for n, a in batch.items()} != {
            n: (s.shape, s.dtype) for n, s in self.specs.items()
        }:
            got = {n: (a.shape, a.dtype.name) for n, a in batch.items()}
            raise ValueError(f"the codec gave {got}, declared are {self.specs}")
        rows = len(next(iter(batch.values())))
        for name, values in batch.items():
            self.arrays[name][self.filled : self.filled + rows] = values
        self.filled += rows


def commit_views(
    layout: Layout, unit: Unit, crops: Sequence[Crop], skipped: Sequence[tuple[str, str]], identity: str
) -> ViewsRecord:
    """Write the tar of a unit and its record. The tar holds no times, users or hosts."""
    final = layout.views(unit)
    offsets, sizes = [], []
    tar_bytes, tar_sha256 = 0, ""
    _clear_temporaries(final)
    if crops:
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = temporary(final)
        with draft.open("wb") as stream:
            with wds.TarWriter(stream, user="", group="", mtime=0, encoder=False) as tar:
                for crop in crops:
                    fields = {"__key__": crop_name(crop.key, unit.view), "jpg": crop.jpeg}
                    if crop.label is not None:
                        fields["cls"] = str(crop.label).encode()
                    tar.write(fields)
            stream.flush()
            os.fsync(stream.fileno())
        with tarfile.open(draft) as written:
            for info in written:
                if info.name.endswith(".jpg"):
                    offsets.append(info.offset_data)
                    sizes.append(info.size)
        tar_bytes, tar_sha256 = draft.stat().st_size, hash_file(draft)
        draft.replace(final)
        sync_folder(final.parent)
    keys = [crop.key for crop in crops]
    record = ViewsRecord(
        identity=identity,
        keys=keys,
        keys_sha256=hash_keys(keys),
        labels=[crop.label for crop in crops],
        offsets=offsets,
        sizes=sizes,
        crc32=[zlib.crc32(crop.jpeg) for crop in crops],
        tar_bytes=tar_bytes,
        tar_sha256=tar_sha256,
        skipped=[list(pair) for pair in skipped],
    )
    record.write(layout.views_record(unit))
    return record


def commit_targets(
    layout: Layout, name: str, unit: Unit, targets: TargetArrays, views: ViewsRecord, identity: str
) -> TargetRecord:
    """Write the Zarr group of a unit's targets and its record."""
    if targets.filled != targets.count or targets.count != len(views.keys):
        raise ValueError(f"{unit}: {targets.filled} rows of {targets.count} for {len(views.keys)} crops")
    final = layout.targets(name, unit)
    files: dict[str, list[Any]] = {}
    _clear_temporaries(final)
    if targets.count:
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = temporary(final)
        write_zarr(draft, targets.arrays)
        files = _sync_tree(draft)
        if final.exists():
            shutil.rmtree(final)  # left over without a record; the lock keeps other jobs away from this set
        draft.replace(final)
        sync_folder(final.parent)
    record = TargetRecord(
        identity=identity,
        count=targets.count,
        keys_sha256=views.keys_sha256,
        views_sha256=views.tar_sha256,
        files=files,
    )
    record.write(layout.target_record(name, unit))
    return record


def write_zarr(folder: Path, arrays: dict[str, npt.NDArray[np.generic]]) -> None:
    """Write arrays as one Zarr v3 group: one shard file an array, inner chunks of `BLOCK_ROWS` rows.

    Standard codec names only (sharding_indexed, bytes, blosc, crc32c), so that any Zarr v3 reader opens it.
    The checksum comes after the compressor: zstd alone does not notice a flipped bit.
    """
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec
    from zarr.storage import LocalStore

    group = zarr.create_group(store=LocalStore(folder), zarr_format=3)
    for name, values in arrays.items():
        shuffle: Literal["bitshuffle", "noshuffle"] = "bitshuffle" if values.dtype.itemsize > 1 else "noshuffle"
        blosc = BloscCodec(cname="zstd", clevel=3, shuffle=shuffle, typesize=values.dtype.itemsize)
        rows = -(-len(values) // BLOCK_ROWS) * BLOCK_ROWS
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(BLOCK_ROWS, *values.shape[1:]),
            shards=(rows, *values.shape[1:]),
            compressors=[blosc, Crc32cCodec()],
            config={"write_empty_chunks": True},  # so that a missing chunk is never a legal one
        )
        array[...] = values


def _sync_tree(folder: Path) -> dict[str, list[Any]]:
    """Sync every file below a folder; return relative path -> [bytes, SHA-256]."""
    files: dict[str, list[Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, hash_file(path)]
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync_folder(path)
    return files


def _clear_temporaries(final: Path) -> None:
    """Remove what a killed process left of this unit; the lock keeps other jobs out, ranks own other units."""
    for path in final.parent.glob(f".{final.name}.*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
