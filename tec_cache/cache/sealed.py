"""JSON that notices its own damage: a body and the SHA-256 of its very bytes, written in exactly one way.

    {"body":BODY,"sha256":"..."}

The hash is that of BODY as it stands in the file, so nobody has to write numbers again to check it: the body is all
but the first 8 and the last 78 bytes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

HEAD, MIDDLE, TAIL = b'{"body":', b',"sha256":"', b'"}\n'
_DIGITS = 64
_BEHIND = len(MIDDLE) + _DIGITS + len(TAIL)


def seal(body: dict[str, Any], *, indent: int | None = None) -> bytes:
    """Write a body and its hash; indent: for files that people read."""
    text = _written(body, indent)
    return HEAD + text + MIDDLE + hashlib.sha256(text).hexdigest().encode() + TAIL


def unseal(data: bytes, *, indent: int | None = None) -> dict[str, Any]:
    """Read a body back. Raises ValueError unless the bytes are exactly those that `seal` would write."""
    text, behind = data[len(HEAD) : -_BEHIND], data[-_BEHIND:]
    framed = len(data) > len(HEAD) + _BEHIND and data.startswith(HEAD) and behind.startswith(MIDDLE)
    if not framed or not data.endswith(TAIL):
        raise ValueError("not a sealed document")
    if behind[len(MIDDLE) : -len(TAIL)] != hashlib.sha256(text).hexdigest().encode():
        raise ValueError("its SHA-256 does not fit its content")
    body = parse(text)
    if rewritten(body, indent) != text:  # a name that comes twice, a number that is none, another spelling
        raise ValueError("its body is not written as it has to be")
    return body


def parse(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError, also for what is nested too deeply to be parsed."""
    try:
        body = json.loads(text.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(body, dict):
        raise ValueError("its body is not an object")
    return body


def rewritten(body: dict[str, Any], indent: int | None) -> bytes:
    """Return a parsed body as it has to be written. Raises ValueError where it cannot be written at all."""
    try:
        return _written(body, indent)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _written(body: dict[str, Any], indent: int | None) -> bytes:
    # strictly UTF-8: a lone surrogate, which JSON can spell, is no text
    if indent is None:
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    return json.dumps(body, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
