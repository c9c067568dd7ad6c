"""Format version 1, which is read and never written. All that is known of it here stands in this file.

Its records lack what binds a unit to its photos, and what says how many views were asked for; its manifests are
sealed in another layout. Otherwise it is version 2.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tec_cache.cache.sealed import parse, rewritten

VERSION = 1
UNKNOWN = "0" * 64
"""Stands for the hash of photos that were not hashed."""

_MANIFEST_HEAD = b'{\n "body": '
_MOST_GROUPS = 2**20
_VIEWS = frozenset({"unit", "identity", "keys", "keys_sha256", "labels", "offsets", "sizes", "crc32", "payload",
                    "skipped"})  # fmt: skip
_SOURCE = frozenset({"shard", "size", "photos", "groups", "damage"})


def is_manifest(data: bytes) -> bool:
    """Say whether these are the bytes of a manifest in this version's layout."""
    return data.startswith(_MANIFEST_HEAD)


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
    return body


def upgrade(body: dict[str, Any]) -> dict[str, Any]:
    """Return a record's body as version 2 has it; what this version did not know gets its neutral value."""
    names = set(body)
    if names in (_VIEWS, _VIEWS | {"views", "targets"}):
        return body | {"photos_sha256": UNKNOWN, "notes": []}
    groups = body.get("groups")
    if names == _SOURCE and isinstance(groups, int) and groups < _MOST_GROUPS:
        return body | {"group_sha256": [UNKNOWN] * groups, "passed_over": {}, "ends_sha256": ""}
    return body
