"""What a cache and a target set were begun with: is anything there that binds a new command to the same?"""

from __future__ import annotations

import platform
from typing import Any

import torch

from tec_cache import __version__
from tec_cache.cache import layout, version1
from tec_cache.cache.lock import CacheLock
from tec_cache.cache.manifest import read_manifest
from tec_cache.store import Store


def versions() -> dict[str, Any]:
    """Versions of what made a cache; a note, not part of its identity."""
    import numcodecs
    import PIL
    import simplejpeg
    import timm
    import zarr

    modules = {"torch": torch, "timm": timm, "zarr": zarr, "numcodecs": numcodecs, "pillow": PIL}
    versions = {name: str(module.__version__) for name, module in modules.items()}
    return {
        "tec_cache": __version__,
        "python": platform.python_version(),
        "simplejpeg": str(simplejpeg.__version__),
        **versions,
    }


def anything_committed(store: Store, target: str | None = None) -> bool:
    """Say whether anything was ever committed to a cache, or to one target set: a unit or a fitted codec."""
    if target is not None:
        units = map(layout.file_of, store.names(layout.target_records(target)))
        return store.size(layout.codec_record(target)) is not None or any(units)
    store = version1.adapted(store)
    files = [layout.file_of(name) for folder in (layout.RECORDS, layout.TARGETS) for name in store.names(folder)]
    return any(file is not None and (file.kind == "codec" or file.is_record) for file in files)


def forget_other(
    store: Store, manifest: str, identity: dict[str, Any], lock: CacheLock, *, target: str | None, overwrite: bool
) -> None:
    """Remove a manifest of other settings to which nothing was ever committed, unless another job may be about to.

    Where nobody can say whether another job is at work (an object store), that takes `overwrite`.
    """
    if store.size(manifest) is None or read_manifest(store, manifest)["identity"] == identity:
        return
    if lock.try_own() or (overwrite and not lock.works):
        if not anything_committed(store, target):  # still: loading a base takes a while
            for name in [] if target is not None else store.names(layout.ASKED_RECORDS):
                store.remove(name)
            store.remove(manifest)
        lock.share()
