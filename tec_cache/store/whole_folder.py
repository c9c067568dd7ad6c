"""A folder of a few files that appears all at once, and is only replaced where every file in it is provably ours.

The files are written to a folder beside it, under a draft's name, which is then renamed: a kill leaves the old folder,
the new one, or (between the two renames of a replacement) none, never a mixture.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tec_cache.documents import MOST_BYTES
from tec_cache.errors import TecCacheError, listed
from tec_cache.store.files import draft_of, hash_file, make_folder, sync_file, sync_folder
from tec_cache.store.local import read_regular

MANIFEST = "tec_cache.json"
"""Names each other file with its SHA-256, under "files"; what else it holds is the writer's."""


def require_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds anything else than such a folder, or one that may not be replaced. TecCacheError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    foreign = [out.name] if not out.is_dir() else _foreign(out)
    if foreign:
        raise TecCacheError(
            f"this place holds something that tec-cache convert did not write, or that was changed: {listed(foreign)}",
            where=str(out),
            todo="name another OUT; what lies here can only be removed by you",
        )
    if not overwrite:
        raise TecCacheError(
            "there is a converted model here already", where=str(out), todo="name another OUT, or --overwrite"
        )


def _foreign(folder: Path) -> list[str]:
    """List what the folder's manifest does not name with the hash that it has."""
    hashes = manifest_of(folder).get("files")
    named = hashes if isinstance(hashes, dict) else {}
    entries = sorted(folder.iterdir())
    ours = [p for p in entries if p.is_file() and (p.name == MANIFEST or named.get(p.name) == hash_file(p))]
    return [p.name for p in entries if p not in ours or not named]


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return what the manifest of a folder holds; empty where there is none that can be read."""
    try:
        found = json.loads(read_regular(folder / MANIFEST, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_whole_folder(out: Path, files: dict[str, bytes], manifest: dict[str, Any], *, overwrite: bool) -> None:
    """Write files, and a manifest with their hashes, as a folder. Raises TecCacheError, and OSError of the disk."""
    require_replaceable(out, overwrite=overwrite)
    make_folder(out.parent)
    draft, old = draft_of(out), draft_of(out)
    try:
        draft.mkdir()
        for name, data in files.items():
            (draft / name).write_bytes(data)
        hashes = {name: hash_file(draft / name) for name in sorted(files)}
        (draft / MANIFEST).write_text(json.dumps(manifest | {"files": hashes}, indent=2) + "\n", encoding="utf-8")
        for name in (*files, MANIFEST):
            sync_file(draft / name)
        sync_folder(draft)
        if out.exists() and any(out.iterdir()):
            os.rename(out, old)
        os.rename(draft, out)
        sync_folder(out.parent)
    except OSError:
        if old.exists() and not out.exists():
            os.rename(old, out)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
