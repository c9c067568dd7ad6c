"""Format version 1, which is read and never written. All that is known of it here stands in this file.

Its documents begin with `{"body":`; all files of a kind lie in one folder; its records lack what binds a unit to its
photos, and what says how many views were asked for; the codes of a pack's samples have no magic.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tec_cache.cache.layout import MANIFEST, SAMPLES, file_of
from tec_cache.cache.sealed import MIDDLE, TAIL, parse, rewritten
from tec_cache.errors import CacheError
from tec_cache.store import Store

VERSION = 1
UNKNOWN = "0" * 64
"""Stands for the hash of photos that were not hashed."""

_RECORD_HEAD = b'{"body":{'
_MANIFEST_HEAD = b'{\n "body": '
_MOST_GROUPS = 2**20
_VIEWS = frozenset({"unit", "identity", "keys", "keys_sha256", "labels", "offsets", "sizes", "crc32", "payload",
                    "skipped"})  # fmt: skip
_SOURCE = frozenset({"shard", "size", "photos", "groups", "damage"})
_FLAT = re.compile(r"(?P<folder>|.*/)(?P<last>(?P<shard>[0-9]{6,9})\.[0-9]{3,7}-v[0-9]{2,4}\..*)")


def is_manifest(data: bytes) -> bool:
    """Say whether a document begins as a manifest of this version."""
    return data.startswith(_MANIFEST_HEAD)


def is_record(data: bytes) -> bool:
    """Say whether a document begins as a record of this version."""
    return data.startswith(_RECORD_HEAD)


def unseal_manifest(data: bytes) -> dict[str, Any]:
    """Read the body of a manifest: the whole document is indented, and the hash is that of the canonical body."""
    document = parse(data)
    body = document.get("body")
    if set(document) != {"body", "sha256"} or not isinstance(body, dict):
        raise ValueError("not a sealed document")
    if document["sha256"] != hashlib.sha256(rewritten(body, None)).hexdigest():
        raise ValueError("its SHA-256 does not fit its content")
    if data != json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n":
        raise ValueError("its body is not written as it has to be")
    if body.get("format") != VERSION:
        raise ValueError("its format version does not fit its layout")
    return body


def unseal_record(data: bytes) -> dict[str, Any]:
    """Read the body of a record, with the fields, and the names of payloads, that the current version has."""
    behind = len(MIDDLE) + 64 + len(TAIL)
    text = data[len(b'{"body":') : -behind]
    if data[-behind:] != MIDDLE + hashlib.sha256(text).hexdigest().encode() + TAIL:
        raise ValueError("its SHA-256 does not fit its content")
    body = parse(text)
    if rewritten(body, None) != text:
        raise ValueError("its body is not written as it has to be")
    return _upgraded(body)


def _upgraded(body: dict[str, Any]) -> dict[str, Any]:
    """Add to a record what this version did not know, with its neutral value."""
    names, codes = set(body), body.get("targets")
    body = _renamed(body)
    if names in (_VIEWS, _VIEWS | {"views", "targets"}):
        body |= {"photos_sha256": UNKNOWN, "notes": []}
    groups = body.get("groups")
    if names == _SOURCE and isinstance(groups, int) and groups < _MOST_GROUPS:
        body |= {"group_sha256": [UNKNOWN] * groups, "passed_over": {}, "ends_sha256": ""}
    if isinstance(codes, dict):
        body["targets"] = {name: _renamed(value) if isinstance(value, dict) else value for name, value in codes.items()}
    return body


def _renamed(body: dict[str, Any]) -> dict[str, Any]:
    """Give the payloads that a record names their names in the current layout."""
    payloads = {name: body[name] for name in ("payload", "views") if isinstance(body.get(name), dict)}
    payloads = {name: value for name, value in payloads.items() if isinstance(value.get("name"), str)}
    return body | {name: value | {"name": current_name(value["name"])} for name, value in payloads.items()}


def current_name(name: str) -> str:
    """Return what a file of this version would be called in the current layout."""
    match = _FLAT.fullmatch(name)
    if match is None:
        return name
    folder = match["folder"] or f"{SAMPLES}/"
    found = f"{folder}{match['shard']}/{match['last']}"
    return found if file_of(found) is not None else name


def flat_name(name: str) -> str:
    """Return what a file of the current layout was called in this version."""
    file = file_of(name)
    if file is None or file.unit is None:
        return name
    *folders, _, last = name.split("/")
    return "/".join([*folders, last]).removeprefix(f"{SAMPLES}/")


def adapted(store: Store) -> Store:
    """Return a store whose files have the names of the current layout, whichever version the cache in it is of."""
    try:
        (head,) = store.read_ranges(MANIFEST, [(0, len(_MANIFEST_HEAD))])
    except FileNotFoundError:
        return store
    except OSError:  # a folder, a pipe: whoever reads it says what is wrong with it
        return store
    return FlatStore(store) if is_manifest(head) else store


class FlatStore:
    """The store of a cache of this version, seen through the names of the current layout. Nothing is written to it."""

    def __init__(self, flat: Store) -> None:
        self.flat, self.url, self.address, self.folder = flat, flat.url, flat.address, flat.folder

    def place(self, name: str) -> str:
        """Return where the file itself lies."""
        return self.flat.place(flat_name(name))

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None where there is none."""
        return self.flat.size(flat_name(name))

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        return self.flat.read(flat_name(name))

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read (offset, bytes) ranges of a file."""
        return self.flat.read_ranges(flat_name(name), ranges)

    def names(self, folder: str) -> list[str]:
        """List all files below a folder; a pack's tars lie in the root itself."""
        if folder == SAMPLES:
            found = [current_name(name) for name in self.flat.entries()]
            return sorted(name for name in found if name.startswith(f"{SAMPLES}/"))
        return sorted(current_name(name) for name in self.flat.names(folder))

    def entries(self, folder: str = "") -> list[str]:
        """List what lies in a folder itself."""
        found = [current_name(name) for name in self.flat.entries(folder)]
        return sorted({name.partition("/")[0] for name in found})

    def draft(self) -> AbstractContextManager[Path]:
        """Refuse to prepare a payload."""
        raise self._read_only()

    def put(self, draft: Path, name: str) -> None:
        """Refuse to write."""
        raise self._read_only()

    def create(self, name: str, data: bytes) -> bool:
        """Refuse to write."""
        raise self._read_only()

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self.flat.remove(flat_name(name))

    def drop_copy(self, name: str) -> bool:
        """Drop what is kept of a file elsewhere."""
        return self.flat.drop_copy(flat_name(name))

    def require_conditional_create(self) -> None:
        """Refuse to write."""
        raise self._read_only()

    def changed_after(self, name: str, folder: str) -> bool | None:
        """Say whether the files of a folder changed since a file was written."""
        return self.flat.changed_after(flat_name(name), folder)

    def free(self) -> int | None:
        """Return the free bytes, None where nobody can say."""
        return self.flat.free()

    def _read_only(self) -> CacheError:
        todo = "extract into another --cache"
        return CacheError("a cache of format version 1 is read and never written", where=self.url, todo=todo)
