"""Where things lie in a cache. Every name of the format is made here and nowhere else.

CACHE/
  cache.json                                identity of the views: plan, JPEG, grid, group size, source shards
  views/000123.002-v03.HASH.tar             source shard 123, group 2, view 3: crops, plain WebDataset
  targets/NAME/target.json                  identity of one target set: base, weights, normalization, k, quality
  targets/NAME/codec.json                   the codec as it was fitted, once, and its measured errors
  targets/NAME/codec.HASH.safetensors       its parameters, where it has any
  targets/NAME/000123.002-v03.HASH.zip      a unit's arrays, standard Zarr v3 in a zip; row i belongs to crop i
  records/asked/02.json                     view 2 of every photo was asked for
  records/source/000123.json                shard 123 was read to its end: photos, groups, damage
  records/content.json                      all shards were read to their end: the hash of each one's record
  records/views/000123.002-v03.json         commit record of a unit of views: payload, keys, offsets, checksums
  records/targets/NAME/000123.002-v03.json  commit record of a unit of targets: payload, block positions

PACK/ (tec-cache pack) has the same cache.json, targets/NAME/{target.json,codec*}, records/source and content, and
  pack.json                                 identity of the pack: of which cache, how many views, which target sets
  000123.002-v03.HASH.tar                   a unit's crops and codes, plain WebDataset
  records/packed/000123.002-v03.json        commit record of a unit: keys, positions, checksums

HASH is the first 16 digits of the file's SHA-256: two jobs that make one unit differently do not overwrite each
other, and the record, which only one of them can create, says whose counts.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote

from tec_cache.errors import ConfigError

MOST_VIEWS = 10_000
"""Views of a photo; a larger number comes from no extraction."""

BLOCK_ROWS = 32
"""Rows of one inner chunk, which are always read together."""

_UNIT = re.compile(r"(\d{6,})\.(\d{3,})-v(\d{2,})")
_FILE = re.compile(rf"({_UNIT.pattern.replace('(', '(?:')})\.(?:[0-9a-f]{{16}}\.(?:tar|zip)|json)")
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
        unit = cls(*(int(part) for part in match.groups())) if match else None
        # one unit, one name: 0000001 is not 000001 once more
        if unit is None or unit.view >= MOST_VIEWS or str(unit) != text:
            raise ValueError(f"not the name of a unit: {text!r}")
        return unit


MANIFEST = "cache.json"
PACK = "pack.json"
VIEWS = "views"
TARGETS = "targets"
ASKED_RECORDS = "records/asked"
SOURCE_RECORDS = "records/source"
CONTENT_RECORD = "records/content.json"
VIEW_RECORDS = "records/views"
PACK_RECORDS = "records/packed"


def target_manifest(name: str) -> str:
    """target.json of a target set."""
    return f"{TARGETS}/{name}/target.json"


def codec_record(name: str) -> str:
    """codec.json of a target set."""
    return f"{TARGETS}/{name}/codec.json"


def codec_payload(name: str, sha256: str) -> str:
    """Parameters of a target set's codec."""
    return f"{TARGETS}/{name}/codec.{sha256[:16]}.safetensors"


def views_payload(unit: Unit, sha256: str) -> str:
    """Tar of a unit's crops."""
    return f"{VIEWS}/{unit}.{sha256[:16]}.tar"


def target_payload(name: str, unit: Unit, sha256: str) -> str:
    """Zip of a unit's targets."""
    return f"{TARGETS}/{name}/{unit}.{sha256[:16]}.zip"


def asked_record(view: int) -> str:
    """Record that a view of every photo was asked for."""
    return f"{ASKED_RECORDS}/{view:02d}.json"


def asked_view(name: str) -> int | None:
    """Return the view whose `asked_record` a name is; None for anything else."""
    text = name.removeprefix(f"{ASKED_RECORDS}/").removesuffix(".json")
    view = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else None
    return view if view is not None and view < MOST_VIEWS and asked_record(view) == name else None


def source_record(shard: int) -> str:
    """Record that a source shard was read to its end."""
    return f"{SOURCE_RECORDS}/{shard:06d}.json"


def views_record(unit: Unit) -> str:
    """Commit record of a unit's crops."""
    return f"{VIEW_RECORDS}/{unit}.json"


def target_records(name: str) -> str:
    """Folder of a target set's commit records."""
    return f"records/targets/{name}"


def target_record(name: str, unit: Unit) -> str:
    """Commit record of a unit's targets."""
    return f"{target_records(name)}/{unit}.json"


def pack_payload(unit: Unit, sha256: str) -> str:
    """Tar of a unit's crops and codes in a pack."""
    return f"{unit}.{sha256[:16]}.tar"


def pack_record(unit: Unit) -> str:
    """Commit record of a unit of a pack."""
    return f"{PACK_RECORDS}/{unit}.json"


def unit_of(name: str) -> Unit | None:
    """Return the unit whose payload or record a name is; None for anything else."""
    match = _FILE.fullmatch(name.rpartition("/")[2])
    try:
        return Unit.parse(match.group(1)) if match else None
    except ValueError:  # another spelling of a number
        return None


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
