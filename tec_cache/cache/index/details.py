"""What an index says of the rows of one unit: who each sample is, and where its crop and its targets lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tec_cache.cache.layout import Unit
from tec_cache.cache.record import PackedCodes, Payload, TargetRecord, ViewsRecord
from tec_cache.rng import key64

if TYPE_CHECKING:
    import numpy.typing as npt

CROP = np.dtype([("sample_key", "<u8"), ("label", "<i8"), ("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
"""A crop: `key64("sample", source shard, key)`, its label (-1 where there is none), and its JPEG within the tar."""
PLACE = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4")])
"""A block of rows of one array within the zip, or a sample's codes within a pack's tar."""


@dataclass(frozen=True)
class StoredCrops:
    """Where the crops of a unit lie; as much of a views' record as reading them takes."""

    unit: str
    payload: Payload | None
    offsets: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint32]
    crc32: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class StoredTargets:
    """Where the targets of a unit lie; as much of a targets' record as reading them takes."""

    count: int
    payload: Payload | None
    blocks: Mapping[str, Sequence[Sequence[int]]]
    """Array -> (byte position in the zip, bytes, CRC-32) of each block of rows."""


@dataclass(frozen=True)
class StoredMembers:
    """Where one target set's codes of a unit lie in a pack's tar."""

    offsets: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    crc32: npt.NDArray[np.uint32]


def crop_details(record: ViewsRecord, shard: str) -> npt.NDArray[np.void]:
    """Return (rows,) of CROP; shard: name of the source shard."""
    details = np.empty(len(record.keys), CROP)
    details["sample_key"] = [key64("sample", shard, key) for key in record.keys]
    details["label"] = [-1 if label is None else label for label in record.labels]
    details["offset"], details["size"], details["crc32"] = record.offsets, record.sizes, record.crc32
    return details


def block_details(record: TargetRecord, arrays: Sequence[str]) -> npt.NDArray[np.void]:
    """Return (blocks, arrays) of PLACE."""
    places = [[tuple(place) for place in record.blocks.get(array, [])] for array in arrays]
    return np.array(places, PLACE).reshape(len(arrays), -1).T.copy()


def member_details(codes: PackedCodes) -> npt.NDArray[np.void]:
    """Return (rows,) of PLACE."""
    details = np.empty(len(codes.offsets), PLACE)
    details["offset"], details["size"], details["crc32"] = codes.offsets, codes.sizes, codes.crc32
    return details


def stored_crops(unit: Unit, payload: Payload | None, details: npt.NDArray[np.void]) -> StoredCrops:
    """Make of a unit's details what reading its crops takes."""
    return StoredCrops(str(unit), payload, details["offset"], details["size"], details["crc32"])


def stored_targets(
    count: int, payload: Payload | None, details: npt.NDArray[np.void], arrays: Sequence[str]
) -> StoredTargets:
    """Make of a unit's details what reading its targets takes; details: (blocks, arrays) of PLACE."""
    return StoredTargets(count, payload, {array: details[:, n].tolist() for n, array in enumerate(arrays)})


def stored_members(details: npt.NDArray[np.void]) -> StoredMembers:
    """Make of a unit's details what reading its codes takes; details: (rows,) of PLACE."""
    return StoredMembers(details["offset"], details["size"], details["crc32"])
