"""Commit records: small JSON files, written last and atomically. What has none does not exist."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, TypeVar

from tec_cache.cache.identity import canonical_json
from tec_cache.errors import CacheError

R = TypeVar("R", bound="_Record")


@dataclass(frozen=True, kw_only=True)
class _Record:
    """JSON in, JSON out; unknown and missing fields are refused."""

    @classmethod
    def read(cls: type[R], path: Path) -> R:
        """Read a record. Raises CacheError if it is damaged."""
        try:
            values = json.loads(path.read_bytes())
            names = {f.name for f in fields(cls)}
            if set(values) != names:
                raise ValueError(f"fields {sorted(set(values) ^ names)} are missing or unknown")
            return cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise CacheError(
                f"damaged record: {error}", where=str(path), todo="remove it and run the same extract again"
            ) from error

    def write(self, path: Path) -> None:
        """Write the record atomically; a reader sees all of it or none."""
        write_atomically(path, canonical_json(asdict(self)) + b"\n")


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


@dataclass(frozen=True, kw_only=True)
class ViewsRecord(_Record):
    """The crops of one unit."""

    identity: str
    """Fingerprint of the cache."""
    keys: list[str]
    """Keys of the samples, in the order of the tar and of the targets."""
    keys_sha256: str
    labels: list[int | None]
    offsets: list[int]
    """Byte position of each crop's JPEG within the tar."""
    sizes: list[int]
    crc32: list[int]
    """Of each JPEG; checked whenever a crop is read."""
    tar_bytes: int
    """0 and no tar where every sample of the group is broken."""
    tar_sha256: str
    skipped: list[list[str]]
    """[key, reason] of each broken sample of the group."""


@dataclass(frozen=True, kw_only=True)
class TargetRecord(_Record):
    """The targets of one unit in one target set."""

    identity: str
    """Fingerprint of the target set."""
    count: int
    keys_sha256: str
    """Of the keys of the views it was made from."""
    views_sha256: str
    """Of the tar it was made from."""
    files: dict[str, list[Any]]
    """Relative path -> [bytes, SHA-256] of every file of the Zarr group."""

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of the unit's targets."""
        return sum(int(size) for size, _ in self.files.values())


def hash_keys(keys: Iterable[str]) -> str:
    """Return the SHA-256 of a list of keys; every key is preceded by its length."""
    digest = hashlib.sha256()
    for key in keys:
        data = key.encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def temporary(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def write_durably(path: Path, write: Callable[[IO[bytes]], object], *, once: bool = False) -> bool:
    """Let `write` fill a file that is there whole or not at all, even after a power cut.

    once: leave a file that is there already, and return False; safe among several processes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary(path)
    try:
        with draft.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if once:
            os.link(draft, path)  # unlike rename, link fails where the name is taken
        else:
            draft.replace(path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file durably, in place of one that is there."""
    write_durably(path, lambda stream: stream.write(data))


def create_once(path: Path, data: bytes) -> bool:
    """Create a file unless it exists; return whether this call created it."""
    return write_durably(path, lambda stream: stream.write(data), once=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
