"""cache.json, target.json and pack.json: the identity of a cache, of each target set in it, and of a pack."""

from __future__ import annotations

from typing import Any

from tec_cache.cache import version1
from tec_cache.cache.identity import fingerprint, require_same
from tec_cache.cache.layout import manifest_kind
from tec_cache.cache.schema import MANIFESTS, read_as
from tec_cache.cache.sealed import FORMAT, OTHER_RELEASE, OtherFormat, seal, unseal
from tec_cache.errors import CacheError, ConfigError
from tec_cache.store import Store

_WRITTEN = ("fingerprint", "identity", "notes")


def ensure_manifest(
    store: Store, name: str, identity: dict[str, Any], notes: dict[str, Any], *, what: str, todo: str
) -> dict[str, Any]:
    """Create a manifest, or check that the one that is there has the same identity.

    notes: what is good to know but decides nothing (names, versions). Several processes may call this at once.
    Raises IdentityError naming the fields that differ, ConfigError for settings that no reader would take.
    """
    body = manifest_body(identity, notes)
    try:
        read_as(MANIFESTS[manifest_kind(name)], body)
    except ValueError as error:
        raise ConfigError(f"{what} cannot have such settings: {error}", where=store.place(name)) from error
    store.create(name, seal(manifest_kind(name), {part: body[part] for part in _WRITTEN}, indent=1))
    stored = read_manifest(store, name)
    require_same(stored["identity"], identity, what=what, where=store.place(name), todo=todo)
    return stored


def manifest_body(identity: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest as it is once written: what it says, and the version of its format."""
    return {"format": FORMAT, "fingerprint": fingerprint(identity), "identity": identity, "notes": notes}


def read_manifest(store: Store, name: str) -> dict[str, Any]:
    """Read cache.json, target.json or pack.json and check its version, its checksums and every field.

    Raises CacheError where it is damaged or gone, or of a version that this program does not know.
    """
    where, todo = store.place(name), "restore it from a copy"
    try:
        data = store.read(name)
        if version1.is_manifest(data):
            manifest = version1.unseal_manifest(data)
        elif version1.is_record(data):  # the layout of version 2, which was never released
            raise OtherFormat(2)
        else:
            manifest = unseal(data, manifest_kind(name), indent=1) | {"format": FORMAT}
        read_as(MANIFESTS[manifest_kind(name)], manifest)
    except OtherFormat as error:
        raise CacheError(str(error), where=where, todo=OTHER_RELEASE) from error
    except (OSError, ValueError) as error:
        raise CacheError(f"damaged manifest: {error}", where=where, todo=todo) from error
    if manifest["fingerprint"] != fingerprint(manifest["identity"]):
        raise CacheError("damaged manifest: its fingerprint does not fit", where=where, todo=todo)
    return manifest


def require_current(manifest: dict[str, Any], where: str) -> None:
    """Raise ConfigError where a cache is of an older version: it is read, and never added to."""
    if manifest["format"] != FORMAT:
        raise ConfigError(
            f"this cache has format version {manifest['format']}, which is read only "
            f"(its units are not bound to their photos); this program writes version {FORMAT}",
            where=where,
            todo="train, probe, info and verify go on with it as it is; to add to it, extract it anew into another "
            "--cache, with the same settings and photos",
        )
