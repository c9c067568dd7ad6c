"""cache.json and target.json: the identity of a cache and of each target set in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tec_cache.cache.identity import FORMAT_VERSION, fingerprint, require_same
from tec_cache.cache.record import create_once
from tec_cache.errors import CacheError


def ensure_manifest(
    path: Path, identity: dict[str, Any], notes: dict[str, Any], *, what: str, todo: str
) -> dict[str, Any]:
    """Create a manifest, or check that the one that is there has the same identity.

    notes: what is good to know but decides nothing (names, versions). Several processes may call this at once.
    Raises IdentityError naming the fields that differ.
    """
    manifest = {
        "format": FORMAT_VERSION,
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "notes": notes,
    }
    if not path.exists():
        create_once(path, json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")
    stored = read_manifest(path)
    require_same(stored["identity"], identity, what=what, where=str(path), todo=todo)
    return stored


def read_manifest(path: Path) -> dict[str, Any]:
    """Read cache.json or target.json and check its version and fingerprint."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
            raise ValueError("it holds no identity")
    except (OSError, ValueError) as error:
        raise CacheError(f"damaged manifest: {error}", where=str(path), todo="restore it from a copy") from error
    if manifest.get("format") != FORMAT_VERSION:
        raise CacheError(
            f"format version {manifest.get('format')}, this program reads {FORMAT_VERSION}",
            where=str(path),
            todo="use the tec-cache release that made it",
        )
    if manifest.get("fingerprint") != fingerprint(manifest["identity"]):
        raise CacheError("damaged manifest: its fingerprint does not fit", where=str(path), todo="restore it")
    return manifest
