"""Documents of a cache, opened and sealed again as whoever knows the format could do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tec_cache.cache.sealed import seal, unseal

PEOPLE_READ = ("cache", "target", "pack")
"""Kinds of documents that are indented."""


def kind_of(data: bytes) -> str:
    """Return the kind that a document says it is."""
    kind: str = json.loads(data)["tec-cache"]
    return kind


def unsealed(path: Path) -> dict[str, Any]:
    """Return the body of a document."""
    data = path.read_bytes()
    kind = kind_of(data)
    return unseal(data, kind, indent=1 if kind in PEOPLE_READ else None)


def reseal(path: Path, body: dict[str, Any]) -> None:
    """Give the document at a path another body."""
    kind = kind_of(path.read_bytes())
    path.write_bytes(seal(kind, body, indent=1 if kind in PEOPLE_READ else None))
