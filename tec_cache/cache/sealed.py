"""JSON that notices its own damage: a body and the SHA-256 of it, written in exactly one way."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tec_cache.cache.identity import canonical_json


def seal(body: dict[str, Any], *, indent: int | None = None) -> bytes:
    """Write {"body": ..., "sha256": ...}; indent: for files that people read."""
    document = {"body": body, "sha256": hashlib.sha256(canonical_json(body)).hexdigest()}
    if indent is None:
        return canonical_json(document) + b"\n"
    return json.dumps(document, indent=indent, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def unseal(data: bytes, *, indent: int | None = None) -> dict[str, Any]:
    """Read a body back. Raises ValueError unless the bytes are exactly those that `seal` would write."""
    document = json.loads(data)
    if not isinstance(document, dict) or set(document) != {"body", "sha256"} or not isinstance(document["body"], dict):
        raise ValueError("not a sealed document")
    body: dict[str, Any] = document["body"]
    if document["sha256"] != hashlib.sha256(canonical_json(body)).hexdigest():
        raise ValueError("its SHA-256 does not fit its content")
    if data != seal(body, indent=indent):
        raise ValueError("it was changed after it was written")
    return body
