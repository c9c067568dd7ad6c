"""Where things lie in a cache. Every name of the format is made here and nowhere else.

CACHE/
  cache.json                                       identity of the views: plan, JPEG, grid, group size, source shards
  views/000123/000123.002-v03.HASH.tar             source shard 123, group 2, view 3: crops, plain WebDataset
  targets/NAME/target.json                         identity of one target set: base, weights, normalization, k, quality
  targets/NAME/codec.json                          the codec as it was fitted, once, and its measured errors
  targets/NAME/codec.HASH.safetensors              its parameters, where it has any
  targets/NAME/000123/000123.002-v03.HASH.zip      a unit's arrays, Zarr v3 in a zip; row i belongs to crop i
  records/asked/02.json                            view 2 of every photo was asked for
  records/source/000123.json                       shard 123 was read to its end: photos, groups, damage
  records/content.json                             all shards were read to their end: the hash of each one's record
  records/views/000123/000123.002-v03.json         commit record of a unit of views: payload, keys, offsets, checksums
  records/targets/NAME/000123/000123.002-v03.json  commit record of a unit of targets: payload, block positions
  index/views.idx  index/targets/NAME.idx          what the records say, in one file for all units; made from them
  .lock  .drafts/                                  of a cache in a folder: who writes; files that are not finished

PACK/ (tec-cache pack) has the same cache.json, targets/NAME/{target.json,codec*}, records/source, content, index, and
  pack.json                                        identity of the pack: of which cache, views, target sets
  samples/000123/000123.002-v03.HASH.tar           a unit's crops and codes, plain WebDataset
  records/packed/000123/000123.002-v03.json        commit record of a unit: keys, positions, checksums

What belongs to a unit lies in a folder of its source shard, so that no folder grows with the number of views: some
stores and hubs refuse more than 10,000 files in one.

HASH is the first 16 digits of the file's SHA-256: two jobs that make one unit differently do not overwrite each
other, and the record, which only one of them can create, says whose counts.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote

from tec_cache.errors import CacheError, ConfigError

MOST_VIEWS = 10_000
"""Views of a photo; a larger number comes from no extraction."""

BLOCK_ROWS = 32
"""Rows of one inner chunk, which are always read together."""

_UNIT = re.compile(r"([0-9]{6,9})\.([0-9]{3,7})-v([0-9]{2,4})")
_NUMBERED = re.compile(r"[0-9]{2,9}\.json")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASH = "[0-9a-f]{16}"
_PAYLOAD = re.compile(rf"(.+)\.{_HASH}\.(tar|zip|safetensors)")
_UNIT_PAYLOAD = re.compile(rf"[0-9]+\.[0-9]+-v[0-9]+\.({_HASH})\.(tar|zip)")


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

    @property
    def folder(self) -> str:
        """Folder of all units of the same source shard."""
        return f"{self.shard:06d}"


LOCK = ".lock"
"""Whoever writes or removes holds a lock on it: in a cache, and in the folder of a run or of rounds."""
DRAFTS = ".drafts"
"""Folder of unfinished files; whatever a killed job leaves is here, or is a payload that no record names."""
SCRATCH = ".tec-cache-plan-"
"""How a scratch folder of `tec-cache plan` begins; twelve hex digits follow."""
MANIFEST = "cache.json"
PACK = "pack.json"
VIEWS = "views"
TARGETS = "targets"
RECORDS = "records"
ASKED_RECORDS = f"{RECORDS}/asked"
SOURCE_RECORDS = f"{RECORDS}/source"
CONTENT_RECORD = f"{RECORDS}/content.json"
VIEW_RECORDS = f"{RECORDS}/views"
TARGET_RECORDS = f"{RECORDS}/targets"
PACK_RECORDS = f"{RECORDS}/packed"
SAMPLES = "samples"
INDEX = "index"
CROP, LABEL = ".jpg", ".cls"
"""How the names of a crop and of its label end in a tar."""
BLOCKS = "/c/"
"""In the name of every block of a zip."""


def target_folder(name: str) -> str:
    """Folder of a target set. Raises ConfigError for a name that cannot be one's, wherever it came from."""
    return f"{TARGETS}/{check_name(name)}"


def target_manifest(name: str) -> str:
    """target.json of a target set."""
    return f"{target_folder(name)}/target.json"


def codec_record(name: str) -> str:
    """codec.json of a target set."""
    return f"{target_folder(name)}/codec.json"


def codec_payload(name: str, sha256: str) -> str:
    """Parameters of a target set's codec."""
    return f"{target_folder(name)}/codec.{_digits(sha256)}.safetensors"


def views_payload(unit: Unit, sha256: str) -> str:
    """Tar of a unit's crops."""
    return f"{VIEWS}/{unit.folder}/{unit}.{_digits(sha256)}.tar"


def target_payload(name: str, unit: Unit, sha256: str) -> str:
    """Zip of a unit's targets."""
    return f"{target_folder(name)}/{unit.folder}/{unit}.{_digits(sha256)}.zip"


def asked_record(view: int) -> str:
    """Record that a view of every photo was asked for."""
    return f"{ASKED_RECORDS}/{view:02d}.json"


def source_record(shard: int) -> str:
    """Record that a source shard was read to its end."""
    return f"{SOURCE_RECORDS}/{shard:06d}.json"


def views_record(unit: Unit) -> str:
    """Commit record of a unit's crops."""
    return f"{VIEW_RECORDS}/{unit.folder}/{unit}.json"


def target_records(name: str) -> str:
    """Folder of a target set's commit records."""
    return f"{TARGET_RECORDS}/{check_name(name)}"


def target_record(name: str, unit: Unit) -> str:
    """Commit record of a unit's targets."""
    return f"{target_records(name)}/{unit.folder}/{unit}.json"


def pack_payload(unit: Unit, sha256: str) -> str:
    """Tar of a unit's crops and codes in a pack."""
    return f"{SAMPLES}/{unit.folder}/{unit}.{_digits(sha256)}.tar"


def pack_record(unit: Unit) -> str:
    """Commit record of a unit of a pack."""
    return f"{PACK_RECORDS}/{unit.folder}/{unit}.json"


def views_index() -> str:
    """Index of all units of views, or of a pack."""
    return f"{INDEX}/views.idx"


def target_index(name: str) -> str:
    """Index of all units of a target set."""
    return f"{INDEX}/targets/{check_name(name)}.idx"


class File(NamedTuple):
    """What a file is, as its name says."""

    kind: str
    """manifest, pack; asked, source, content, views, targets, packed (records); target, codec (target.json,
    codec.json); index; and the payloads views tar, targets zip, packed tar, parameters."""
    unit: Unit | None = None
    target: str = ""
    """Name of the target set."""
    record: str = ""
    """Record that names it, where it is a payload."""
    number: int | None = None
    """Of the source shard, or of the view asked for, of a record of one."""

    @property
    def is_record(self) -> bool:
        """Whether it is the record of something that was made: that a view was asked for is no more than a wish."""
        return self.kind in ("source", "content", "views", "targets", "packed")


def file_of(name: str) -> File | None:
    """Say what a file is by its whole name; None for every name that this format does not make.

    Only what has such a name is ever removed: `records/notes.json`, `codec.json.bak` and `views/old/UNIT.HASH.tar`
    are somebody else's, and so is another spelling of a number.
    """
    *folders, last = name.split("/")
    match folders:
        case []:
            return {MANIFEST: File("manifest"), PACK: File("pack")}.get(last)
        case ["views", shard]:
            return _payload("views tar", shard, last, "tar")
        case ["samples", shard]:
            return _payload("packed tar", shard, last, "tar")
        case ["targets", target] if _NAME.fullmatch(target):
            if last in ("target.json", "codec.json"):
                return File(last.removesuffix(".json"), target=target)
            if re.fullmatch(rf"codec\.{_HASH}\.safetensors", last):
                return File("parameters", target=target, record=codec_record(target))
        case ["targets", target, shard] if _NAME.fullmatch(target):
            return _payload("targets zip", shard, last, "zip", target)
        case ["records"]:
            return File("content") if name == CONTENT_RECORD else None
        case ["records", ("asked" | "source") as kind] if _NUMBERED.fullmatch(last):
            number = int(last.removesuffix(".json"))
            if kind == "asked" and number >= MOST_VIEWS:
                return None
            record = {"asked": asked_record, "source": source_record}[kind]
            return File(kind, number=number) if record(number) == name else None
        case ["records", ("views" | "packed") as kind, shard] if last.endswith(".json"):
            unit = _parsed(last[:-5], shard)
            return File(kind, unit) if unit else None
        case ["records", "targets", target, shard] if _NAME.fullmatch(target) and last.endswith(".json"):
            unit = _parsed(last[:-5], shard)
            return File("targets", unit, target) if unit else None
        case ["index"] if name == views_index():
            return File("index")
        case ["index", "targets"] if last.endswith(".idx") and _NAME.fullmatch(last[:-4]):
            return File("index", target=last[:-4])
    return None


def unit_of(name: str) -> Unit | None:
    """Return the unit whose payload or record a file is; None for anything else."""
    file = file_of(name)
    return file.unit if file else None


def _payload(kind: str, shard: str, last: str, suffix: str, target: str = "") -> File | None:
    match = _PAYLOAD.fullmatch(last)
    unit = _parsed(match[1], shard) if match and match[2] == suffix else None
    if unit is None:
        return None
    record = {"views tar": views_record, "packed tar": pack_record}.get(kind)
    return File(kind, unit, target, record(unit) if record else target_record(target, unit))


def _parsed(text: str, shard: str) -> Unit | None:
    """Return the unit of that name in the folder of its shard; None for no unit, or another spelling of one."""
    try:
        unit = Unit.parse(text)
    except ValueError:
        return None
    return unit if unit.folder == shard else None


def _digits(sha256: str) -> str:
    """Return what a name holds of a hash, which may come from a record. Raises CacheError for what is none."""
    if not _SHA256.fullmatch(sha256):
        raise CacheError(f"{sha256[:80]!r} is no SHA-256", todo="the record that names it is damaged: remove it")
    return sha256[:16]


def manifest_kind(name: str) -> str:
    """Return the kind of a manifest as its heading has it: cache, target or pack."""
    return name.rpartition("/")[2].removesuffix(".json")


def what_of(record: str) -> str:
    """Return what a record is of, for a message: its name without the folder of all records."""
    return record.removeprefix(f"{RECORDS}/").removesuffix(".json")


def digits_of(file: str) -> str | None:
    """Return the digits of the SHA-256 in the file name of a unit's payload; None for any other file."""
    match = _UNIT_PAYLOAD.fullmatch(file)
    return match[1] if match else None


def array_metadata(array: str) -> str:
    """Name of the metadata of an array in a zip, which are Zarr's."""
    return f"{array}/zarr.json"


def array_block(array: str, number: int, axes: int) -> str:
    """Name of a block of rows of an array in a zip; axes: those of a row, which are never divided."""
    return f"{array}{BLOCKS}{number}{'/0' * axes}"


def is_set_name(name: str) -> bool:
    """Say whether a name can be a target set's (and a folder's)."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Return `name` if it can name a target set, or raise ConfigError."""
    if not is_set_name(name):
        raise ConfigError(
            f"{name[:200]!r} cannot name a target set",
            todo="use at most 100 letters, digits, '.', '_' and '-', with --name; the first a letter or a digit",
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
