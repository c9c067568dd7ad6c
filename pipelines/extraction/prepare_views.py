"""Before stage one cuts anything: which cache and which views, and are they the same as before?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pipelines.extraction.same_as_before import anything_committed, forget_other, versions
from pipelines.extraction.shard_contents import look_at_contents, same_contents
from pipelines.loading.base_given import given_by
from tec_cache.base.load import load_base
from tec_cache.base.source import find_source
from tec_cache.cache import layout, version1
from tec_cache.cache.identity import differences, require_same
from tec_cache.cache.lock import CacheLock
from tec_cache.cache.manifest import ensure_manifest, manifest_body, read_manifest, require_current
from tec_cache.cache.pixels import RESIZER, JpegSettings
from tec_cache.cache.reader import Cache
from tec_cache.cache.remove import remove_all
from tec_cache.cache.sealed import FORMAT
from tec_cache.config import ExtractConfig
from tec_cache.data.classes import read_classes
from tec_cache.data.photos import Shard
from tec_cache.data.source import Source, open_source
from tec_cache.data.views import ViewPlan
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, SourceError
from tec_cache.printable import counted
from tec_cache.store import Store, open_store

DEFAULT_VIEWS = 4
"""Views per photo. Nobody has published what few views cost dense targets; for logits 50 stored views in place of
400 lose nothing. Four views already give four crops and, masks being drawn anew in every epoch, another task each
time; they fit on one disk, and more can be added later."""


@dataclass(frozen=True)
class ViewJob:
    """How the views of a cache are cut, and from what; no shards where the photos were not given."""

    plan: ViewPlan
    jpeg: JpegSettings
    source: Source
    num_views: int

    @property
    def shards(self) -> list[Shard]:
        """The source's."""
        return self.source.shards


def prepare_cache(
    config: ExtractConfig,
    store: Store,
    *,
    dry_run: bool,
    overwrite: bool,
    ranks: Ranks,
    lock: CacheLock,
    quiet: bool = True,
) -> tuple[Cache, ViewJob]:
    """Open or create the cache; return it with what is to be cut.

    Settings that were not given are the cache's, or the defaults where there is no cache yet.
    """
    if not (config.input or config.base or config.name):
        raise ConfigError("nothing to do", todo="give photos, or --base to add targets to a cache")
    if config.input and not (config.base or config.name or config.views_only):
        raise ConfigError("no base was named", todo="give --base mae (or another), or --views-only")
    _refuse_overwrite_by_many(overwrite, ranks)
    if store.size(layout.PACK) is not None:
        raise ConfigError("this is a pack, which is read only", where=config.cache, todo="tec-cache unpack PACK CACHE")
    given_by(config)
    if config.base is not None:
        find_source(config.base, config.base_weights)  # nothing is begun for a base that there is not
    stored: dict[str, Any] | None = None
    if store.size(layout.MANIFEST) is not None and (anything_committed(store) or config.input is None):
        # where nothing was committed a manifest binds nobody
        stored = read_manifest(store, layout.MANIFEST)
    if stored is None and config.input is None:
        raise ConfigError("there is no cache here yet", where=config.cache, todo="give the photos it is made from")
    if stored is not None and not (overwrite and config.input):
        require_current(stored, config.cache)
    plan, jpeg, settings = _view_settings(config, stored["identity"] if stored else None)
    if config.input is None:
        assert stored is not None
        source, about_source = Source([]), {n: stored["identity"].get(n) for n in ("source", "classes", "label_field")}
    else:
        source, about_source = _source(config, plan, stored, overwrite=overwrite, quiet=quiet)
        if stored is not None:
            about = about_source["source"]
            entries = same_contents(Cache(store, stored), source.shards, about["shards"], overwrite=overwrite)
            about_source |= {"source": about | {"shards": entries}}
    cache = _open_or_create(
        config, store, stored, settings | about_source, dry_run=dry_run, overwrite=overwrite, lock=lock
    )
    num_views = config.views or cache.num_views or (1 if plan.crop == "center" else DEFAULT_VIEWS)
    if plan.crop == "center" and num_views > 1:
        raise ConfigError("all views of a centre crop are the same", todo="give --views 1")
    if config.input is None:
        num_views = config.views or cache.num_views
        if num_views > cache.num_views:
            raise ConfigError(f"the cache has {counted(cache.num_views, 'view')}", todo="give the photos to add views")
        cache.require_recorded(num_views)
    return cache, ViewJob(plan, jpeg, source, num_views)


def _open_or_create(
    config: ExtractConfig,
    store: Store,
    stored: dict[str, Any] | None,
    identity: dict[str, Any],
    *,
    dry_run: bool,
    overwrite: bool,
    lock: CacheLock,
) -> Cache:
    """Return the cache of this identity; refuse one of another, or replace it when that was asked for."""
    older = stored is not None and stored["format"] != FORMAT
    if stored is not None and overwrite and (older or differences(stored["identity"], identity)):
        if config.base:  # nothing is removed for a command that cannot be carried out
            load_base(config.base, config.base_weights, grid=identity["grid"], k=None, given=given_by(config))
        if dry_run:
            manifest = manifest_body(identity, {})
            # what would be there afterwards: nothing
            return Cache(open_store(f"{store.address}/.replaced"), manifest)
        lock.own()
        remove_all(version1.adapted(store))
        lock.share()
        stored = None
    todo = "leave the settings as they were, name another --cache, or replace it with --overwrite"
    if dry_run:
        if stored is not None:
            where = store.place(layout.MANIFEST)
            require_same(stored["identity"], identity, what="the cache", where=where, todo=todo)
        manifest = manifest_body(identity, {})
    else:
        if stored is None:
            forget_other(store, layout.MANIFEST, identity, lock, target=None, overwrite=overwrite)
        manifest = ensure_manifest(store, layout.MANIFEST, identity, versions(), what="the cache", todo=todo)
    return Cache(store, manifest)


def _view_settings(
    config: ExtractConfig, stored: dict[str, Any] | None
) -> tuple[ViewPlan, JpegSettings, dict[str, Any]]:
    """Resolve each setting of the views: what was given, else what is stored, else the default."""
    old_views = stored["views"] if stored else {}
    old_jpeg = stored["jpeg"] if stored else {}
    given = {n: getattr(config, n) for n in ("crop", "size", "scale", "flip", "seed")}
    plan_values = old_views | {n: v for n, v in given.items() if v is not None}
    plan_values |= {n: tuple(plan_values[n]) for n in ("scale", "ratio") if n in plan_values}
    plan = ViewPlan(**plan_values)
    given = {"quality": config.jpeg_quality, "subsampling": config.jpeg_subsampling}
    jpeg = JpegSettings(**(old_jpeg | {n: v for n, v in given.items() if v is not None}))
    settings = {
        "views": plan.to_json(),
        "jpeg": jpeg.to_json(),
        "resizer": RESIZER,
        "grid": config.grid or (stored["grid"] if stored else 14),
        "group_size": config.group_size or (stored["group_size"] if stored else 1024),
    }
    return plan, jpeg, settings


def _source(
    config: ExtractConfig, plan: ViewPlan, stored: dict[str, Any] | None, *, overwrite: bool, quiet: bool
) -> tuple[Source, dict[str, Any]]:
    """Find the photos and their classes; with a limit, count photos up to it so that every rank takes the same ones."""
    assert config.input is not None
    before = stored["identity"] if stored else {}
    known = before if not overwrite else {}  # what the labels mean is found anew for a cache that is replaced
    classes = read_classes(config.classes) if config.classes is not None else None
    field = config.label_field or known.get("label_field")
    source = open_source(config.input, seed=plan.seed, classes=classes, label_field=field)
    in_field = any(shard.labels_in_field for shard in source.shards)
    if config.label_field is not None and not in_field:
        todo = "leave it out: the labels of a folder of photos are its class folders"
        raise ConfigError(f"--label-field {config.label_field} with a folder of photos", where=config.input, todo=todo)
    limit = config.limit
    if limit is None and stored is not None:
        limit = before["source"]["limit"]
    takes: list[dict[str, Any]] = []
    left = limit
    for shard in source.shards:
        take = {}
        if left is not None:
            if left == 0:
                break
            count, whole = _count(shard, left, config.on_error)
            if whole:
                take["take"] = count
            left -= count
        takes.append(take)
    source = replace(source, shards=source.shards[: len(takes)])
    if not known:
        source = source.with_labels(quiet=quiet)
    elif classes is None and known.get("classes") is not None and (in_field or _same_names(source, known["source"])):
        # of a folder only while its photos are the same: else its class folders are compared with the stored ones
        source = source.with_classes(tuple(known["classes"]))
    look_at_contents(source.shards, quiet=quiet)
    entries = [shard.identity() | take for shard, take in zip(source.shards, takes, strict=True)]
    about = {"limit": limit, "shards": entries}
    names = None if source.classes is None else list(source.classes)
    return source, {"source": about, "classes": names, "label_field": source.label_field}


def _same_names(source: Source, known: dict[str, Any]) -> bool:
    """Say whether the photos of a folder have the names that are stored."""
    hashes = [shard.files_sha256 for shard in source.shards]
    return hashes == [entry.get("files_sha256") for entry in known["shards"]]


def _count(shard: Shard, most: int, on_error: str) -> tuple[int, bool]:
    """Count photos up to `most`; False where the shard is damaged before that and damage is to be skipped."""
    count = 0
    try:
        for _ in islice(shard.photos(), most):
            count += 1
    except SourceError:
        if on_error == "stop":
            raise
        return count, False
    return count, True


def _refuse_overwrite_by_many(overwrite: bool, ranks: Ranks) -> None:
    if overwrite and not ranks.alone:
        raise ConfigError(
            "--overwrite in several processes or parts at once",
            todo="run it once in one process (with --dry-run first), then go on with torchrun or --part without it",
        )
