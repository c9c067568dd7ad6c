"""Where things lie in a cache folder. Every name of the format is made here and nowhere else.

CACHE/
  cache.json                              identity of the views: plan, JPEG, grid, group size, source shards
  views/000123.002-v03.tar                source shard 123, group 2, view 3: crops, plain WebDataset
  targets/NAME/target.json                identity of one target set: base, weights, normalization, k, codec
  targets/NAME/000123.002-v03.zarr/       its arrays, standard Zarr v3; row i belongs to crop i of the tar
  records/source/000123.json              shard 123 was read to its end: photos, groups, damage
  records/views/000123.002-v03.json       commit record of a unit of views: keys, offsets, checksums, skipped
  records/targets/NAME/000123.002-v03.json   commit record of a unit of targets
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from tec_cache.errors import ConfigError

BLOCK_ROWS = 32
"""Rows of one inner chunk, which are always read together."""

_UNIT = re.compile(r"(\d{6,})\.(\d{3,})-v(\d{2,})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Unit(NamedTuple):
    """One piece of work and of storage: a group of consecutive samples of a source shard, in one view number."""

    shard: int
    group: int
    view: int

    def __str__(self) -> str:
        return f"{self.shard:06d}.{self.group:03d}-v{self.view:02d}"

    @classmethod
    def parse(cls, text: str) -> Unit:
        """Read a unit's name back; raises ValueError for anything else."""
        match = _UNIT.fullmatch(text)
        if match is None:
            raise ValueError(f"not the name of a unit: {text!r}")
        return cls(*(int(part) for part in match.groups()))


@dataclass(frozen=True)
class Layout:
    """The paths of one cache."""

    root: Path

    @property
    def manifest(self) -> Path:
        """cache.json."""
        return self.root / "cache.json"

    def views(self, unit: Unit) -> Path:
        """Tar of a unit's crops."""
        return self.root / "views" / f"{unit}.tar"

    def target_folder(self, name: str) -> Path:
        """Folder of one target set."""
        return self.root / "targets" / name

    def target_manifest(self, name: str) -> Path:
        """target.json of one target set."""
        return self.target_folder(name) / "target.json"

    def targets(self, name: str, unit: Unit) -> Path:
        """Zarr group of a unit's targets."""
        return self.target_folder(name) / f"{unit}.zarr"

    def source_record(self, shard: int) -> Path:
        """Record that a source shard was read to its end."""
        return self.root / "records" / "source" / f"{shard:06d}.json"

    def views_record(self, unit: Unit) -> Path:
        """Commit record of a unit's crops."""
        return self.root / "records" / "views" / f"{unit}.json"

    def target_record(self, name: str, unit: Unit) -> Path:
        """Commit record of a unit's targets."""
        return self.root / "records" / "targets" / name / f"{unit}.json"


def check_name(name: str) -> str:
    """Return `name` if it can name a target set (and a folder), or raise ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name a target set", todo="use letters, digits, '.', '_' and '-', with --name"
        )
    return name


def crop_name(key: str, view: int) -> str:
    """Return the WebDataset key of a crop: the sample's key, escaped without loss, and the view number.

    A dot would end the key for WebDataset, so it is written %2E (and % as %25); '/' stays, unless it would make
    a path absolute or empty in part.
    """
    escaped = quote(key, safe="/").replace(".", "%2E")
    if escaped.startswith("/") or escaped.endswith("/") or "//" in escaped:
        escaped = escaped.replace("/", "%2F")
    return f"{escaped}-v{view:02d}"
