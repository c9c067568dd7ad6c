"""JSON that says what it is and notices its own damage, written in exactly one way.

    {"tec-cache":KIND,"format":3,"body":BODY,"sha256":"..."}

The hash is that of all bytes before it: of the file without its last 78 bytes. So nobody has to write numbers again to
check it, and the first bytes tell a stranger what the file is and a reader whether it can read it.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

FORMAT = 3
"""Version of the format on disk that is written."""

MAGIC = b'{"tec-cache":"'
_HEAD = re.compile(rb'\{"tec-cache":"([a-z]{1,20})","format":([1-9][0-9]{0,8}),"body":')
MIDDLE, TAIL = b',"sha256":"', b'"}\n'
_DIGITS = 64
_BEHIND = len(MIDDLE) + _DIGITS + len(TAIL)


OTHER_RELEASE = "use the tec-cache release that made it"


class OtherFormat(ValueError):
    """A whole document of a version that this program does not read."""

    def __init__(self, version: int) -> None:
        super().__init__(f"format version {version}, this program reads {FORMAT} (and 1)")
        self.version = version


def seal(kind: str, body: dict[str, Any], *, indent: int | None = None) -> bytes:
    """Write a body and its hash; kind: of the document, in lower-case letters; indent: for files that people read."""
    text = b'%b%b","format":%d,"body":%b' % (MAGIC, kind.encode(), FORMAT, _written(body, indent))
    return text + MIDDLE + hashlib.sha256(text).hexdigest().encode() + TAIL


def unseal(data: bytes, kind: str, *, indent: int | None = None) -> dict[str, Any]:
    """Read the body of a document of that kind.

    Raises ValueError unless the bytes are exactly those that `seal` would write; OtherFormat for another version.
    """
    text, behind = data[:-_BEHIND], data[-_BEHIND:]
    head = _HEAD.match(text)
    if head is None or not behind.startswith(MIDDLE) or not data.endswith(TAIL):
        raise ValueError("not a sealed document")
    if behind[len(MIDDLE) : -len(TAIL)] != hashlib.sha256(text).hexdigest().encode():
        raise ValueError("its SHA-256 does not fit its content")
    if int(head[2]) != FORMAT:
        raise OtherFormat(int(head[2]))
    if head[1].decode() != kind:
        raise ValueError(f"a document of kind {head[1].decode()!r}, not {kind!r}")
    written = text[head.end() :]
    body = parse(written)
    if rewritten(body, indent) != written:  # a name that comes twice, a number that is none, another spelling
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
