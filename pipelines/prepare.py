"""Before stage one spends anything: which cache, which views, which targets, and is it the same as before?"""

from __future__ import annotations

import platform
import shutil
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tec_cache import __version__
from tec_cache.base.load import load_base
from tec_cache.base.model import FrozenBase
from tec_cache.cache.identity import FORMAT_VERSION, differences, fingerprint, require_same
from tec_cache.cache.layout import Layout, check_name
from tec_cache.cache.lock import writing
from tec_cache.cache.manifest import ensure_manifest, read_manifest
from tec_cache.cache.pixels import RESIZER, JpegSettings
from tec_cache.cache.reader import Cache
from tec_cache.codec import Codec, get_codec
from tec_cache.config import ExtractConfig, parse_rows
from tec_cache.data.source import Shard, find_shards
from tec_cache.data.views import ViewPlan
from tec_cache.device import Compute, default_threads, resolve_compute
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, IdentityError, SourceError, TecCacheError
from tec_cache.types import TargetSpec

DEFAULT_VIEWS = 4
"""Views per photo. Nobody has published what few views cost dense targets; for logits 50 stored views in place of
400 lose nothing. Four views already give four crops and, masks being drawn anew in every epoch, another task each
time; they fit on one disk (ImageNet, ViT-B, fp16: about 2 TB by arithmetic), and more can be added later."""


@dataclass(frozen=True)
class TargetJob:
    """One target set to be made: the base, how to store what it says, and on what to compute it."""

    name: str
    base: FrozenBase
    spec: TargetSpec
    codec: Codec
    batch_size: int
    compute: Compute
    fingerprint: str


def prepare_cache(
    config: ExtractConfig, *, dry_run: bool, overwrite: bool, ranks: Ranks
) -> tuple[Cache, ViewPlan, JpegSettings, list[Shard], int]:
    """Open or create the cache. Returns it with its plan, JPEG settings, source shards and number of views.

    Settings that were not given are the cache's, or the defaults where there is no cache yet.
    """
    if not (config.input or config.base or config.name):
        raise ConfigError("nothing to do", todo="give photos, or --base to add targets to a cache")
    if config.input and not (config.base or config.name or config.views_only):
        raise ConfigError("no base was named", todo="give --base mae (or another), or --views-only")
    layout = Layout(Path(config.cache))
    _refuse_overwrite_by_many(overwrite, ranks)
    stored: dict[str, Any] | None = None
    if layout.manifest.exists() and (any_record(layout.root / "records") or config.input is None):
        # without a record nothing was committed: such a manifest binds nobody (other jobs are locked out)
        stored = read_manifest(layout.manifest)
    if stored is None and config.input is None:
        raise ConfigError("there is no cache here yet", where=config.cache, todo="give the photos it is made from")
    plan, jpeg, settings = _view_settings(config, stored["identity"] if stored else None)
    shards: list[Shard] = []
    if config.input is None:
        assert stored is not None
        source = stored["identity"]["source"]
    else:
        shards, source = _source(config, plan, stored)
    cache = _open_or_create(config, layout, stored, settings | {"source": source}, dry_run=dry_run, overwrite=overwrite)
    _refuse_changed(cache, shards)
    num_views = config.views or cache.num_views or (1 if plan.crop == "center" else DEFAULT_VIEWS)
    if plan.crop == "center" and num_views > 1:
        raise ConfigError("all views of a centre crop are the same", todo="give --views 1")
    if config.input is None:
        num_views = config.views or cache.num_views
        if num_views > cache.num_views:
            raise ConfigError(f"the cache has {cache.num_views} views", todo="give the photos to add views")
        cache.require_complete(num_views)
    return cache, plan, jpeg, shards, num_views


def _open_or_create(
    config: ExtractConfig,
    layout: Layout,
    stored: dict[str, Any] | None,
    identity: dict[str, Any],
    *,
    dry_run: bool,
    overwrite: bool,
) -> Cache:
    """Return the cache of this identity; refuse one of another, or replace it when that was asked for."""
    if stored is not None and overwrite and differences(stored["identity"], identity):
        if config.base:  # nothing is removed for a command that cannot be carried out
            load_base(config.base, config.base_weights, grid=identity["grid"], k=None)
        if dry_run:
            layout = Layout(layout.root / ".replaced")  # what would be there afterwards: nothing yet
        else:
            _clear(layout)
        stored = None
    todo = "leave the settings as they were, name another --cache, or replace it with --overwrite"
    if dry_run:
        if stored is not None:
            require_same(stored["identity"], identity, what="the cache", where=str(layout.manifest), todo=todo)
        manifest = {"format": FORMAT_VERSION, "fingerprint": fingerprint(identity), "identity": identity}
    else:
        try:
            if stored is None:
                _forget_other(layout.manifest, identity)
            manifest = ensure_manifest(layout.manifest, identity, _versions(), what="the cache", todo=todo)
        except OSError as error:
            raise TecCacheError(
                f"the cache cannot be written: {error.strerror}",
                where=config.cache,
                todo="choose another --cache",
            ) from error
    return Cache(layout, manifest)


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


def _source(config: ExtractConfig, plan: ViewPlan, stored: dict[str, Any] | None) -> tuple[list[Shard], dict[str, Any]]:
    """Find the shards; with a limit, count photos up to it so that every rank takes the same ones."""
    assert config.input is not None
    shards = find_shards(config.input, seed=plan.seed)
    limit = config.limit
    if limit is None and stored is not None:
        limit = stored["identity"]["source"]["limit"]
    entries: list[dict[str, Any]] = []
    left = limit
    for shard in shards:
        entry = shard.identity()
        if left is not None:
            if left == 0:
                break
            count, whole = _count(shard, left, config.on_error)
            if whole:
                entry["take"] = count
            left -= count
        entries.append(entry)
    return shards[: len(entries)], {"limit": limit, "shards": entries}


def _refuse_changed(cache: Cache, shards: list[Shard]) -> None:
    """Refuse shards that are not those whose views are in the cache."""
    for number, shard in enumerate(shards):
        record = cache.source_record(number)
        if record is not None and record.size != shard.size:
            raise IdentityError(
                f"source shard {shard.name} has changed: {record.size:,} bytes when its views were made, "
                f"{shard.size:,} now",
                where=shard.place,
                todo="restore it, name another --cache, or replace the cache with --overwrite",
            )


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


def lock_views(config: ExtractConfig, ranks: Ranks) -> AbstractContextManager[None]:
    """Keep other jobs from writing the views of the cache, or say why it cannot be written at all."""
    try:
        Path(config.cache).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TecCacheError(
            f"the cache cannot be written: {error.strerror}", where=config.cache, todo="choose another --cache"
        ) from error
    return writing(Path(config.cache), "the views of this cache", ranks)


def prepare_targets(
    config: ExtractConfig, cache: Cache, *, dry_run: bool, overwrite: bool, ranks: Ranks, locks: ExitStack
) -> TargetJob:
    """Load the base and open or create its target set, locked until `locks` is closed."""
    name = check_name(config.name or default_name(str(config.base)))
    path = cache.layout.target_manifest(name)
    begun = any_record(cache.layout.root / "records" / "targets" / name)
    stored = read_manifest(path) if path.exists() and (begun or config.base is None) else None
    replaces = overwrite and stored is not None
    if replaces and config.base is not None:
        stored = None
    if config.base is None and stored is None:
        raise ConfigError(f"the cache has no target set {name!r} to go on with", todo="give --base")
    before = stored["identity"] if stored else {}
    base_name = config.base or stored["notes"]["base"]  # type: ignore[index]
    compute = resolve_compute(config.device, config.precision or before.get("precision") or "auto", ranks.local_rank)
    k: Any = parse_rows(config.k)
    if k is None:
        k = before["spec"]["k"] if before else "recipe"
    base = load_base(
        base_name,
        config.base_weights,
        grid=cache.grid,
        last_layers=config.last_layers or before.get("last_layers") or 2,
        k=None if k == "none" else k,
    )
    spec = base.spec(config.normalization or (before["spec"]["normalization"] if before else "patch"))
    codec = get_codec(config.codec or before.get("codec") or "fp16")
    on_cpu = compute.device.type == "cpu"
    threads = (config.threads or before.get("threads") or default_threads(ranks.world_size)) if on_cpu else None
    if threads is not None:
        # one machine gives one answer: matrix products depend on how many threads divide them
        torch.set_num_threads(threads)
    batch_size = int(config.batch_size or before.get("batch_size") or 64)
    identity: dict[str, Any] = {
        "base": base.identity,
        "input_size": base.input_size,
        "resizer": RESIZER,
        "last_layers": base.last_layers,
        "spec": spec.to_json(),
        "codec": codec.to_json(),
        "precision": compute.precision,
        "batch_size": batch_size,
        "threads": threads,
        "cache": cache.fingerprint,
    }
    what, todo = f"target set {name!r}", "give the settings as they were, another --name, or --overwrite"
    if dry_run:
        if stored is not None and not overwrite:
            require_same(before, identity, what=what, where=str(path), todo=todo)
    else:
        locks.enter_context(writing(cache.layout.target_folder(name), f"the target set {name!r}", ranks))
        if replaces:
            _clear_targets(cache.layout, name)
        if stored is None:
            _forget_other(path, identity)
        notes = _versions() | {"base": base_name, "first_row": base.first_row}
        ensure_manifest(path, identity, notes, what=what, todo=todo)
    base.to(compute.device)
    return TargetJob(name, base, spec, codec, batch_size, compute, fingerprint(identity))


def default_name(base: str) -> str:
    """Name a target set after its base: a known name, timm's name, or the last part of a path."""
    if base.startswith("timm:"):
        return base.removeprefix("timm:")
    return Path(base).stem if Path(base).is_file() else Path(base).name or base


def _versions() -> dict[str, Any]:
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


def _refuse_overwrite_by_many(overwrite: bool, ranks: Ranks) -> None:
    if overwrite and ranks.world_size > 1:
        raise ConfigError(
            "--overwrite in several processes at once",
            todo="run it once in one process, then go on with torchrun",
        )


def any_record(folder: Path) -> bool:
    """Say whether anything was ever committed below a folder of records."""
    return any(folder.rglob("*.json"))


def _forget_other(manifest: Path, identity: dict[str, Any]) -> None:
    """Remove a manifest of other settings to which nothing was ever committed."""
    if manifest.exists() and read_manifest(manifest)["identity"] != identity:
        manifest.unlink(missing_ok=True)


def _clear_targets(layout: Layout, name: str) -> None:
    """Remove a target set, its records first: what has none does not exist. The lock file stays."""
    shutil.rmtree(layout.root / "records" / "targets" / name, ignore_errors=True)
    layout.target_manifest(name).unlink()
    for unit in layout.target_folder(name).glob("*.zarr"):
        shutil.rmtree(unit)


def _clear(layout: Layout) -> None:
    """Remove what this project wrote below a cache folder, and nothing else."""
    for name in ("records", "cache.json", "views", "targets"):
        path = layout.root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
