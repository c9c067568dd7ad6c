"""cache.json and target.json: the identity of a cache and of each target set in it."""

from __future__ import annotations

from typing import Any

from tec_cache.cache.identity import FORMAT_VERSION, fingerprint, require_same
from tec_cache.cache.sealed import seal, unseal
from tec_cache.errors import CacheError
from tec_cache.store import Store


def ensure_manifest(
    store: Store, name: str, identity: dict[str, Any], notes: dict[str, Any], *, what: str, todo: str
) -> dict[str, Any]:
    """Create a manifest, or check that the one that is there has the same identity.

    notes: what is good to know but decides nothing (names, versions). Several processes may call this at once.
    Raises IdentityError naming the fields that differ.
    """
    store.create(name, manifest_bytes(identity, notes))
    stored = read_manifest(store, name)
    require_same(stored["identity"], identity, what=what, where=store.place(name), todo=todo)
    return stored


def manifest_bytes(identity: dict[str, Any], notes: dict[str, Any]) -> bytes:
    """Return a manifest as it is written, for people to read as well."""
    body = {"format": FORMAT_VERSION, "fingerprint": fingerprint(identity), "identity": identity, "notes": notes}
    return seal(body, indent=1)


def read_manifest(store: Store, name: str) -> dict[str, Any]:
    """Read cache.json or target.json and check its version and checksums."""
    where, todo = store.place(name), "restore it from a copy"
    try:
        manifest = unseal(store.read(name), indent=1)
    except (OSError, ValueError) as error:
        raise CacheError(f"damaged manifest: {error}", where=where, todo=todo) from error
    if manifest.get("format") != FORMAT_VERSION:
        raise CacheError(
            f"format version {manifest.get('format')}, this program reads {FORMAT_VERSION}",
            where=where,
            todo="use the tec-cache release that made it",
        )
    if manifest.get("fingerprint") != fingerprint(manifest["identity"]):
        raise CacheError("damaged manifest: its fingerprint does not fit", where=where, todo=todo)
    return manifest
