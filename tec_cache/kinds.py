"""What a path or URL is: one of the things that this program makes, or something else."""

from __future__ import annotations

from collections import Counter
from enum import Enum
from itertools import islice
from pathlib import Path

from tec_cache.cache import layout
from tec_cache.documents import read_document
from tec_cache.errors import TecCacheError
from tec_cache.store import open_store

RUN_FILE = "run.json"
ROUNDS_FILE = "rounds.json"
EXPORT_FILE = "config.json"
WEIGHTS_FILE, ADAPTERS_FILE, CARD_FILE = "model.safetensors", "adapters/adapters.safetensors", "README.md"
"""Beside EXPORT_FILE. Adapters have a folder: some versions of timm take any .safetensors there for the model's."""

MOST_ENTRIES = 1000
"""Entries of a foreign folder that are looked at."""


class Kind(Enum):
    """What can lie at a place; the value is its name in messages and in `--json`."""

    CACHE = "cache"
    PACK = "pack"
    RUN = "run"
    EXPORT = "export"
    ROUNDS = "rounds"
    OTHER = "something else"
    NOTHING = "nothing"


def what_is(place: str) -> Kind:
    """Say what lies at a path or URL, by the files that only one kind has. Reads next to nothing.

    Raises ConfigError for an unknown kind of URL, StorageError where a store does not answer.
    """
    store = open_store(place)
    if store.size(layout.PACK) is not None:
        return Kind.PACK
    if store.size(layout.MANIFEST) is not None:
        return Kind.CACHE
    if store.folder is None:  # runs and exports lie in folders
        return Kind.NOTHING
    if (store.folder / RUN_FILE).is_file():
        return Kind.RUN
    if (store.folder / ROUNDS_FILE).is_file():
        return Kind.ROUNDS
    if _is_export(store.folder / EXPORT_FILE):
        return Kind.EXPORT
    return Kind.OTHER if store.folder.exists() else Kind.NOTHING


def _is_export(file: Path) -> bool:
    """Say whether a config.json was written by `tec-cache export`: those of other programs have no such entry."""
    try:
        return file.is_file() and "tec_cache" in read_document(file)
    except TecCacheError:
        return False


def contents(place: Path) -> str:
    """Describe a file or folder that is none of ours in a few words."""
    if not place.is_dir():
        return "a file"
    names = [entry.name for entry in islice(place.iterdir(), MOST_ENTRIES + 1)]
    if not names:
        return "an empty folder"
    kinds = Counter("".join(Path(name).suffixes[-1:]).lower() or "names without suffix" for name in names)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    return f"a folder of {listed}" + (", ..." if len(kinds) > 4 or len(names) > MOST_ENTRIES else "")
