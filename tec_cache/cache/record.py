"""Commit records: small sealed JSON files, created last and never changed. What has none does not exist.

Whatever reads a record has it checked here, against its schema and its own name: what comes out can be used as a
path, a size or a position. Whether it fits the cache is `reader.Cache`'s to say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar, TypeVar

from msgspec import Meta

from tec_cache.cache import layout, version1
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.schema import (
    Block,
    Crc32,
    Error,
    Int64,
    MaybeSha256,
    Pair,
    SetName,
    Sha256,
    Size,
    ranges_problem,
    read_as,
)
from tec_cache.cache.sealed import OTHER_RELEASE, OtherFormat, seal, unseal
from tec_cache.errors import CacheError
from tec_cache.printable import counted
from tec_cache.store import Store

R = TypeVar("R", bound="_Record")

NameOf = Callable[[Unit, str], str]
"""(unit, SHA-256) -> name of the payload."""

MEND = "tec-cache verify CACHE --full --repair drops what is bad, then run the same tec-cache extract again"


@dataclass(frozen=True)
class Payload:
    """A file that a record names; its name holds the first half of its hash."""

    name: str
    size: Size
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class _Record:
    """JSON in, JSON out. A missing field is damage; one that this version does not know is kept and not looked at."""

    kind: ClassVar[str]
    """What the document says it is."""
    written = b""
    """The bytes that it was read from."""

    @classmethod
    def read(cls: type[R], store: Store, name: str) -> R:
        """Read a record. Raises CacheError if it is damaged or gone."""
        try:
            return cls.from_bytes(store.read(name), name)
        except OtherFormat as error:
            raise CacheError(str(error), where=store.place(name), todo=OTHER_RELEASE) from error
        except (OSError, ValueError) as error:
            raise CacheError(f"damaged record: {error}", where=store.place(name), todo=MEND) from error

    @classmethod
    def from_bytes(cls: type[R], data: bytes, name: str) -> R:
        """Read the bytes of the record `name`. Raises ValueError if they are damaged."""
        body = version1.unseal_record(data) if version1.is_record(data) else unseal(data, cls.kind)
        record = read_as(cls, body)
        problem = record.problem(name)
        if problem:
            raise ValueError(problem)
        object.__setattr__(record, "written", data)
        return record

    def problem(self, name: str) -> str:
        """Say what makes no sense in a record of this name; empty where all is well."""
        raise NotImplementedError

    def values(self) -> dict[str, Any]:
        """Return the fields that are known, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_bytes(self) -> bytes:
        """Return the record as it is written: as it was read, where it was, whatever it holds besides."""
        return self.written or seal(self.kind, asdict(self))

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole document."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def create(self: R, store: Store, name: str) -> R:
        """Write the record unless one is there; return the one that is there afterwards.

        Raises ValueError for a record that no reader would take: a mistake of ours.
        """
        data = self.to_bytes()
        type(self).from_bytes(data, name)
        return self if store.create(name, data) else type(self).read(store, name)


@dataclass(frozen=True, kw_only=True)
class AskedRecord(_Record):
    """A view of every photo was asked for: an extraction that cuts it has begun."""

    kind = "asked"

    identity: Sha256
    """Fingerprint of the cache."""
    view: Size

    def problem(self, name: str) -> str:
        """Compare the view with the record's name."""
        return "" if layout.asked_record(self.view) == name else "the record of another view"


@dataclass(frozen=True, kw_only=True)
class SourceRecord(_Record):
    """A source shard was read to its end."""

    kind = "source"

    shard: str
    """Its name."""
    size: Size
    """Its bytes (or photos, for a part of a folder), so that a later change is noticed."""
    ends_sha256: MaybeSha256
    """Of its ends, `tec_cache.data.contents`, as it was when it was read: a shard may be mended before that."""
    photos: Size
    """Photos seen, broken ones included."""
    groups: Size
    damage: str
    """Why reading ended early, where it did and damage was to be skipped; else empty."""
    passed_over: dict[str, Size]
    """Kind -> how many things in it are no photos; those beside the shards are in the first shard's record."""
    group_sha256: list[Sha256]
    """`hash_photos` of each group: what every unit of views over it must show."""

    def problem(self, name: str) -> str:
        """Compare the numbers of groups and photos."""
        if len(self.group_sha256) != self.groups or self.groups > self.photos:
            hashes = counted(len(self.group_sha256), "hash")
            return f"{counted(self.photos, 'photo')} in {counted(self.groups, 'group')}, {hashes} of groups"
        return ""


@dataclass(frozen=True, kw_only=True)
class ContentRecord(_Record):
    """All source shards were read to their end. What was read is the content of this cache from then on."""

    kind = "content"

    identity: Sha256
    """Fingerprint of the cache."""
    source_sha256: list[Sha256]
    """Of the record of each source shard, the whole file."""

    def problem(self, name: str) -> str:
        """Say nothing: how many shards there are is the cache's to know."""
        return ""


@dataclass(frozen=True, kw_only=True)
class ViewsRecord(_Record):
    """The crops of one unit."""

    kind = "views"

    unit: str
    identity: Sha256
    """Fingerprint of the cache."""
    photos_sha256: Sha256
    """`hash_photos` of all photos of the group, which is the same in each of its views."""
    keys: list[str]
    """Keys of the samples, in the order of the tar and of the targets."""
    keys_sha256: Sha256
    labels: list[Int64 | None]
    offsets: list[Size]
    """Byte position of each crop's JPEG within the tar, rising."""
    sizes: list[Size]
    crc32: list[Crc32]
    """Of each JPEG; checked whenever a crop is read."""
    payload: Payload | None
    """The tar; None where every sample of the group is broken."""
    skipped: list[Pair]
    """[key, reason] of each broken sample of the group."""
    notes: list[Pair]
    """[key, text]: what of whole samples was not understood, and not needed."""

    def problem(self, name: str) -> str:
        """Compare the record with its name, the lists with each other, the positions with the payload."""
        unit = layout.unit_of(name)
        if unit is None or self.unit != str(unit):
            return f"the record of another unit, {self.unit}"
        lists = {what: len(getattr(self, what)) for what in ("labels", "offsets", "sizes", "crc32")}
        if set(lists.values()) - {len(self.keys)}:
            return f"{counted(len(self.keys), 'key')}, and {lists}"
        if hash_keys(self.keys) != self.keys_sha256:
            return "the hash of its keys does not fit"
        return self._payload_problem(unit)

    def _payload_problem(self, unit: Unit) -> str:
        ranges = zip(self.offsets, self.sizes, strict=True)
        return payload_problem(self.payload, layout.views_payload, unit, len(self.keys)) or (
            ranges_problem(ranges, self.payload.size) if self.payload else ""
        )


@dataclass(frozen=True, kw_only=True)
class PackedCodes:
    """One target set's members in a unit of a pack, and the targets of the cache that they were made from."""

    identity: Sha256
    """Fingerprint of the target set."""
    codec_sha256: MaybeSha256
    payload: Payload | None
    """The cache's zip of Zarr arrays, which unpacking makes again."""
    arrays_sha256: Sha256
    """Of the arrays' values, `tec_cache.pack.frames.hash_arrays`: they must come back whatever wrote the zip."""
    offsets: list[Size]
    """Byte position of each crop's member within the pack's tar, rising."""
    sizes: list[Size]
    crc32: list[Crc32]
    """Of each member; checked whenever it is read."""


@dataclass(frozen=True, kw_only=True)
class PackRecord(ViewsRecord):
    """One unit of a pack. Offsets and payload are those of the pack's tar, which holds the codes as well."""

    kind = "packed"

    views: Payload | None
    """The cache's tar of the same crops, which unpacking makes again."""
    targets: dict[SetName, PackedCodes]

    def _payload_problem(self, unit: Unit) -> str:
        count = len(self.keys)
        problem = payload_problem(self.payload, layout.pack_payload, unit, count) or payload_problem(
            self.views, layout.views_payload, unit, count
        )
        ranges = list(zip(self.offsets, self.sizes, strict=True))
        for name, codes in self.targets.items():
            if not len(codes.offsets) == len(codes.sizes) == len(codes.crc32) == count:
                return f"{counted(count, 'key')}, {counted(len(codes.offsets), 'member')} of {name}"
            problem = problem or payload_problem(codes.payload, _zip_of(name), unit, count)
            ranges += zip(codes.offsets, codes.sizes, strict=True)
        if problem or self.payload is None:
            return problem
        rising = all(o == sorted(o) for o in (self.offsets, *(codes.offsets for codes in self.targets.values())))
        return ranges_problem(sorted(ranges), self.payload.size) if rising else "its byte ranges are out of order"


@dataclass(frozen=True, kw_only=True)
class TargetRecord(_Record):
    """The targets of one unit in one target set."""

    kind = "targets"

    unit: str
    identity: Sha256
    """Fingerprint of the target set."""
    codec_sha256: MaybeSha256
    """Of the codec's parameters with which it was encoded; empty where the codec has none."""
    count: Size
    keys_sha256: Sha256
    """Of the keys of the views it was made from."""
    views_sha256: MaybeSha256
    """Of the tar it was made from; empty where there is none."""
    payload: Payload | None
    """The zip of Zarr arrays; None for a unit without samples."""
    blocks: dict[str, list[Block]]
    """Array -> [byte position in the zip, bytes, CRC-32] of each block of rows."""

    def problem(self, name: str) -> str:
        """Compare the record with its name, and the blocks with the number of rows and the payload."""
        file = layout.file_of(name)
        if file is None or file.unit is None or self.unit != str(file.unit):
            return f"the record of another unit, {self.unit}"
        problem = payload_problem(self.payload, _zip_of(file.target), file.unit, self.count)
        if problem:
            return problem
        if self.payload is None:
            return "blocks of no rows" if any(self.blocks.values()) else ""
        number = -(-self.count // BLOCK_ROWS)
        for array, blocks in self.blocks.items():
            if len(blocks) != number:
                return f"{counted(len(blocks), 'block')} of {array} for {counted(self.count, 'row')}"
            if any(crc >= 2**32 for *_, crc in blocks):
                return f"a CRC-32 of {array} that is none"
            if blocks != sorted(blocks):
                return f"the blocks of {array} are out of order"
        return ranges_problem(sorted(b for blocks in self.blocks.values() for b in blocks), self.payload.size)


ErrorName = Annotated[str, Meta(pattern=r"\A(mse|kl|class)(_max|_std)?\Z")]


@dataclass(frozen=True, kw_only=True)
class CodecRecord(_Record):
    """How a target set is coded: fitted once, before its first unit."""

    kind = "codec"

    identity: Sha256
    """Fingerprint of the target set."""
    payload: Payload | None
    """The fitted parameters; None for a codec without any."""
    fitted_views: Size
    """Views from which the parameters were fitted."""
    checked_views: Size
    """Views of other photos on which the errors were measured."""
    errors: dict[ErrorName, Error]
    """Names of `tec_cache.codec.errors.TargetErrors.summary` -> value."""

    def problem(self, name: str) -> str:
        """Compare the payload with the record's name; see that no error is missing."""
        payload, target = self.payload, name.split("/")[-2]
        if payload is not None and payload.name != layout.codec_payload(target, payload.sha256):
            return f"it names {payload.name}, which is not this set's"
        kinds = {error.partition("_")[0] for error in self.errors}
        wanted = {f"{kind}{suffix}" for kind in kinds for suffix in ("", "_max", "_std")}
        if set(self.errors) != wanted or ("mse" in kinds) != (self.checked_views > 0):
            return f"it states the errors {sorted(self.errors)}, measured on {counted(self.checked_views, 'view')}"
        return ""


def payload_problem(payload: Payload | None, name_of: NameOf, unit: Unit, count: int) -> str:
    """Say whether a unit of `count` samples has the payload that it must have."""
    if (payload is None) != (count == 0):
        return f"{counted(count, 'sample')} and {'no' if payload is None else 'a'} payload"
    if payload is not None and payload.name != name_of(unit, payload.sha256):
        return f"it names {payload.name}, which is not this unit's"
    return ""


def _zip_of(target: str) -> NameOf:
    return lambda unit, sha256: layout.target_payload(target, unit, sha256)


def hash_keys(keys: Iterable[str]) -> str:
    """Return the SHA-256 of a list of keys; every key is preceded by its length."""
    digest = hashlib.sha256()
    for key in keys:
        data = key.encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()


def hash_photos(photos: Iterable[tuple[str, int | None, bytes]]) -> str:
    """Return the SHA-256 over the photos of a group: (key, label, SHA-256 of the photo's bytes as they were read).

    Of each, in order: the key's UTF-8 length (4 bytes, little endian) and bytes, the label as decimal ASCII digits
    and a newline (the newline alone where there is none), the 32 bytes of the hash. A photo that gave no bytes has
    the hash of none.
    """
    digest = hashlib.sha256()
    for key, label, sha256 in photos:
        data = key.encode()
        digest.update(len(data).to_bytes(4, "little") + data)
        digest.update(b"\n" if label is None else b"%d\n" % label)
        digest.update(sha256)
    return digest.hexdigest()
