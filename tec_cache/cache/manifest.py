"""cache.json, target.json and pack.json: the identity of a cache, of each target set in it, and of a pack."""

from __future__ import annotations

from typing import Any

from tec_cache.cache import version1
from tec_cache.cache.identity import FORMAT_VERSION, fingerprint, require_same
from tec_cache.cache.schema import MANIFESTS, read_as
from tec_cache.cache.sealed import seal, unseal
from tec_cache.errors import CacheError, ConfigError
from tec_cache.store import Store


def ensure_manifest(
    store: Store, name: str, identity: dict[str, Any], notes: dict[str, Any], *, what: str, todo: str
) -> dict[str, Any]:
    """Create a manifest, or check that the one that is there has the same identity.

    notes: what is good to know but decides nothing (names, versions). Several processes may call this at once.
    Raises IdentityError naming the fields that differ, ConfigError for settings that no reader would take.
    """
    body = manifest_body(identity, notes)
    try:
        read_as(MANIFESTS[name.rpartition("/")[2]], body)
    except ValueError as error:
        raise ConfigError(f"{what} cannot have such settings: {error}", where=store.place(name)) from error
    store.create(name, seal(body, indent=1))
    stored = read_manifest(store, name)
    require_same(stored["identity"], identity, what=what, where=store.place(name), todo=todo)
    return stored


def manifest_body(identity: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest says, in the version that is written."""
    return {"format": FORMAT_VERSION, "fingerprint": fingerprint(identity), "identity": identity, "notes": notes}


def read_manifest(store: Store, name: str) -> dict[str, Any]:
    """Read cache.json, target.json or pack.json and check its version, its checksums and every field.

    Raises CacheError where it is damaged or gone, or of a version that this program does not know.
    """
    where, todo = store.place(name), "restore it from a copy"
    try:
        data = store.read(name)
        old = version1.is_manifest(data)
        manifest = version1.unseal_manifest(data) if old else unseal(data, indent=1)
        version = manifest.get("format")
        if type(version) is int and version > FORMAT_VERSION:
            raise CacheError(
                f"format version {version}, this program reads {version1.VERSION} and {FORMAT_VERSION}",
                where=where,
                todo="use the tec-cache release that made it",
            )
        if version != (version1.VERSION if old else FORMAT_VERSION):
            raise ValueError("its format version does not fit its layout")
        read_as(MANIFESTS[name.rpartition("/")[2]], manifest)
    except (OSError, ValueError) as error:
        raise CacheError(f"damaged manifest: {error}", where=where, todo=todo) from error
    if manifest["fingerprint"] != fingerprint(manifest["identity"]):
        raise CacheError("damaged manifest: its fingerprint does not fit", where=where, todo=todo)
    return manifest


def require_current(manifest: dict[str, Any], where: str) -> None:
    """Raise ConfigError where a cache is of an older version: it is read, and never added to."""
    if manifest["format"] != FORMAT_VERSION:
        raise ConfigError(
            f"this cache has format version {manifest['format']}, which is read only "
            f"(its units are not bound to their photos); this program writes version {FORMAT_VERSION}",
            where=where,
            todo="train, probe, info and verify go on with it as it is; to add to it, extract it anew into another "
            "--cache, with the same settings and photos",
        )
