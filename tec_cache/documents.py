"""JSON that other programs or people may have written: read as what it should be, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tec_cache.errors import TecCacheError
from tec_cache.store.local import read_regular

T = TypeVar("T")

MOST_BYTES = 64 << 20
"""Of a document. The settings of a run that names each of a million groups have 40 MB."""


def read_document(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises TecCacheError where the file is missing, larger than MOST_BYTES, or anything else."""
    try:
        document = json.loads(read_regular(file, MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from error
    if not isinstance(document, dict):
        raise TecCacheError("this is no JSON object", where=str(file), todo=_TODO)
    return document


def read_as(file: Path, kind: type[T]) -> T:
    """Read a JSON object as a `msgspec.Struct`; fields that it does not have are passed over. Raises TecCacheError."""
    try:
        return msgspec.convert(read_document(file), kind)
    except msgspec.ValidationError as error:
        raise _unreadable(file, error) from error


_TODO = "restore it from a copy"


def _unreadable(file: Path, error: Exception) -> TecCacheError:
    return TecCacheError(f"this file cannot be understood: {error}", where=str(file), todo=_TODO)
