"""Commit records: small sealed JSON files, created last and never changed. What has none does not exist."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from tec_cache.cache.sealed import seal, unseal
from tec_cache.errors import CacheError
from tec_cache.store import Store

R = TypeVar("R", bound="_Record")

MEND = "tec-cache verify CACHE --full --repair drops what is bad, then run the same tec-cache extract again"


@dataclass(frozen=True)
class Payload:
    """A file that a record names; its name holds the first half of its hash."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Record:
    """JSON in, JSON out; unknown and missing fields are refused, but for those that early records do not have."""

    @classmethod
    def read(cls: type[R], store: Store, name: str) -> R:
        """Read a record. Raises CacheError if it is damaged or gone."""
        try:
            return cls.from_bytes(store.read(name))
        except (OSError, ValueError, TypeError) as error:
            raise CacheError(f"damaged record: {error}", where=store.place(name), todo=MEND) from error

    @classmethod
    def from_bytes(cls: type[R], data: bytes) -> R:
        """Read a record's bytes. Raises ValueError or TypeError if they are damaged."""
        values = unseal(data)
        names = {f.name for f in fields(cls)}
        later = {f.name for f in fields(cls) if f.default_factory is not MISSING}
        if not names - later <= set(values) <= names:
            raise ValueError(f"fields {sorted(set(values) ^ names)} are missing or unknown")
        return cls(**cls._typed(values))

    @staticmethod
    def _typed(values: dict[str, Any]) -> dict[str, Any]:
        """Turn plain JSON values into the fields' types."""
        return values | {"payload": _payload(values.get("payload"))} if "payload" in values else values

    def to_bytes(self) -> bytes:
        """Return the record as it is written."""
        return seal(asdict(self))

    def create(self: R, store: Store, name: str) -> R:
        """Write the record unless one is there; return the one that is there afterwards."""
        return self if store.create(name, self.to_bytes()) else type(self).read(store, name)


@dataclass(frozen=True, kw_only=True)
class SourceRecord(_Record):
    """A source shard was read to its end."""

    shard: str
    """Its name."""
    size: int
    """Its bytes (or photos, for a part of a folder), so that a later change is noticed."""
    photos: int
    """Photos seen, broken ones included."""
    groups: int
    damage: str
    """Why reading ended early, where it did and damage was to be skipped; else empty."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Kind -> how many things in it are no photos; those beside the shards are in the first shard's record."""


@dataclass(frozen=True, kw_only=True)
class ViewsRecord(_Record):
    """The crops of one unit."""

    unit: str
    identity: str
    """Fingerprint of the cache."""
    keys: list[str]
    """Keys of the samples, in the order of the tar and of the targets."""
    keys_sha256: str
    labels: list[int | None]
    offsets: list[int]
    """Byte position of each crop's JPEG within the tar, rising."""
    sizes: list[int]
    crc32: list[int]
    """Of each JPEG; checked whenever a crop is read."""
    payload: Payload | None
    """The tar; None where every sample of the group is broken."""
    skipped: list[list[str]]
    """[key, reason] of each broken sample of the group."""


@dataclass(frozen=True, kw_only=True)
class PackedCodes:
    """One target set's members in a unit of a pack, and the targets of the cache that they were made from."""

    identity: str
    """Fingerprint of the target set."""
    codec_sha256: str
    payload: Payload | None
    """The cache's zip of Zarr arrays, which unpacking makes again."""
    arrays_sha256: str
    """Of the arrays' values, `tec_cache.pack.frames.hash_arrays`: they must come back whatever wrote the zip."""
    offsets: list[int]
    """Byte position of each crop's member within the pack's tar, rising."""
    sizes: list[int]
    crc32: list[int]
    """Of each member; checked whenever it is read."""


@dataclass(frozen=True, kw_only=True)
class PackRecord(ViewsRecord):
    """One unit of a pack. Offsets and payload are those of the pack's tar, which holds the codes as well."""

    views: Payload | None
    """The cache's tar of the same crops, which unpacking makes again."""
    targets: dict[str, PackedCodes]

    @staticmethod
    def _typed(values: dict[str, Any]) -> dict[str, Any]:
        codes = {
            name: PackedCodes(**(entry | {"payload": _payload(entry["payload"])}))
            for name, entry in values["targets"].items()
        }
        payloads = {name: _payload(values[name]) for name in ("payload", "views")}
        return values | payloads | {"targets": codes}


@dataclass(frozen=True, kw_only=True)
class TargetRecord(_Record):
    """The targets of one unit in one target set."""

    unit: str
    identity: str
    """Fingerprint of the target set."""
    codec_sha256: str
    """Of the codec's parameters with which it was encoded; empty where the codec has none."""
    count: int
    keys_sha256: str
    """Of the keys of the views it was made from."""
    views_sha256: str
    """Of the tar it was made from; empty where there is none."""
    payload: Payload | None
    """The zip of Zarr arrays; None for a unit without samples."""
    blocks: dict[str, list[list[int]]]
    """Array -> [byte position in the zip, bytes, CRC-32] of each block of rows."""


@dataclass(frozen=True, kw_only=True)
class CodecRecord(_Record):
    """How a target set is coded: fitted once, before its first unit."""

    identity: str
    """Fingerprint of the target set."""
    payload: Payload | None
    """The fitted parameters; None for a codec without any."""
    fitted_views: int
    """Views from which the parameters were fitted."""
    checked_views: int
    """Views of other photos on which the errors were measured."""
    errors: dict[str, float]
    """Names of `tec_cache.codec.errors.TargetErrors.summary` -> value."""


def _payload(values: dict[str, Any] | None) -> Payload | None:
    return None if values is None else Payload(**values)


def hash_keys(keys: Iterable[str]) -> str:
    """Return the SHA-256 of a list of keys; every key is preceded by its length."""
    digest = hashlib.sha256()
    for key in keys:
        data = key.encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()
