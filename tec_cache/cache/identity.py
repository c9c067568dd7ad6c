"""What makes a cache or a target set the one it is, and the refusal to mix two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tec_cache.errors import IdentityError, listed
from tec_cache.printable import counted

MOST_LINES = 20


def canonical_json(value: Any) -> bytes:
    """Serialize plain values to one byte string: sorted keys, no spaces, UTF-8; lone surrogates as JSON's \\udce9.

    Raises ValueError for NaN.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an identity, as hex."""
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def differences(stored: Any, asked: Any, path: str = "") -> list[str]:
    """List the fields in which two identities differ, as 'a.b: stored X, asked Y'."""
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        lines = []
        for key in sorted({*stored, *asked}):
            lines += differences(stored.get(key), asked.get(key), f"{path}.{key}" if path else str(key))
        return lines
    if stored == asked or canonical_json(stored) == canonical_json(asked):  # 1 and 1.0, (a, b) and [a, b]
        return []
    if _rows(stored) and _rows(asked):
        if len(stored) != len(asked):
            return [f"{path}: stored {counted(len(stored), 'entry')}, asked {len(asked)}"]
        pairs = enumerate(zip(stored, asked, strict=True))
        return [line for i, (old, new) in pairs for line in differences(old, new, f"{path}[{_place(i, old, new)}]")]
    if _names(stored) and _names(asked) and set(stored) != set(asked):
        sides = (("stored", set(stored) - set(asked)), ("asked", set(asked) - set(stored)))
        return [f"{path}: only {side} are {listed(sorted(names))}" for side, names in sides if names]
    return [f"{path}: stored {_short(stored)}, asked {_short(asked)}"]


def require_same(stored: Mapping[str, Any], asked: Mapping[str, Any], *, what: str, where: str, todo: str) -> None:
    """Raise IdentityError naming every differing field unless both identities are the same."""
    lines = differences(stored, asked)
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"... and {len(lines) - MOST_LINES} more"]
    if lines:
        raise IdentityError(f"{what} was made with other settings:", where=where, todo=todo, details=lines)


def _place(number: int, stored: Any, asked: Any) -> str:
    """Name an entry of a list by its number, and by its name where both have the same."""
    names = [entry.get("name") for entry in (stored, asked) if isinstance(entry, Mapping)]
    return f"{number}, {names[0]}" if len(names) == 2 and names[0] is not None and names[0] == names[1] else str(number)


def _rows(value: Any) -> bool:
    """Say whether a value is a list of objects, to be compared one by one."""
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def _names(value: Any) -> bool:
    """Say whether a value is a list of names, of which those that differ are told."""
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 70 else text[:67] + "..."
