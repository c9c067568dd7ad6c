"""Before the base sees anything: which base, which targets of it, and are they the same as before?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipelines.extraction.same_as_before import anything_committed, forget_other, versions
from pipelines.loading.base_given import given_by
from pipelines.loading.base_of_set import base_again, given_before, remember, still_there
from tec_cache.base.facts import Fact
from tec_cache.base.load import load_base
from tec_cache.base.model import FrozenBase
from tec_cache.base.source import default_name
from tec_cache.cache import layout
from tec_cache.cache.identity import fingerprint, require_same
from tec_cache.cache.layout import check_name
from tec_cache.cache.lock import CacheLock
from tec_cache.cache.manifest import ensure_manifest, read_manifest
from tec_cache.cache.pixels import RESIZER
from tec_cache.cache.reader import Cache
from tec_cache.cache.remove import remove_target_set
from tec_cache.codec.quality import Quality
from tec_cache.config import ExtractConfig
from tec_cache.device import Compute, default_threads, device_notes, resolve_compute
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError
from tec_cache.recipes import recipe_of
from tec_cache.store import Store
from tec_cache.types import TargetSpec

DEFAULT_FIT_VIEWS = 512
"""Views from which the codec is fitted: 100,000 tokens, for bases of a few hundred to a thousand channels."""

_ROWS = "attention"
"""Name of the fact that says which rows of attention are stored."""


@dataclass(frozen=True)
class TargetJob:
    """One target set to be made: the base, how exactly to keep what it says, and on what to compute it."""

    name: str
    base: FrozenBase
    spec: TargetSpec
    quality: Quality
    fit_views: int
    batch_size: int
    compute: Compute
    fingerprint: str
    threads: int | None = None
    """Of the base on a CPU."""
    replaces: bool = False
    """Whether a dry run would remove the set that is there."""

    @property
    def computed(self) -> dict[str, Any]:
        """On what it is computed, by the names of its identity: these decide the last bits."""
        return {
            "device": self.compute.device.type,
            "precision": self.compute.precision,
            "batch_size": self.batch_size,
            "threads": self.threads,
        }


@dataclass(frozen=True)
class _Before:
    """What a target set was begun with; nothing where there is none yet, or where it is to be replaced."""

    stored: dict[str, Any] | None
    """Its manifest."""
    replaces: bool
    """Whether a set that is there is to be removed first."""

    @property
    def identity(self) -> dict[str, Any]:
        """Its settings, by name."""
        return self.stored["identity"] if self.stored else {}

    @property
    def spec(self) -> dict[str, Any]:
        """Those of what is stored of a view."""
        return self.identity.get("spec", {})

    @property
    def notes(self) -> dict[str, Any]:
        """What else is known of it."""
        return self.stored["notes"] if self.stored else {}

    def origin(self, fact: str) -> str | None:
        """Return who said what is assumed of its base; None where that is not noted."""
        return next((origin for name, _, origin in self.notes.get("facts", ()) if name == fact), None)


def prepare_targets(
    config: ExtractConfig, cache: Cache, *, dry_run: bool, overwrite: bool, ranks: Ranks, lock: CacheLock
) -> TargetJob:
    """Load the base and open or create its target set.

    Settings that were not given are the set's, or the defaults where there is no set yet.
    """
    name, store = check_name(config.name or default_name(str(config.base))), cache.store
    before = _before(config, store, name, overwrite=overwrite)
    base, remembered = _load(config, cache, name, before)
    precision = config.precision or before.identity.get("precision") or "auto"
    compute = resolve_compute(config.device, precision, ranks.local_rank, shared=True)
    quality, fit_views = _quality(config, before)
    threads = None
    if compute.device.type == "cpu":
        # one machine gives one answer: matrix products depend on how many threads divide them
        threads = config.threads or before.identity.get("threads") or default_threads(ranks.world_size)
        torch.set_num_threads(threads)
    spec = base.spec(config.normalization or before.spec.get("normalization", "patch"))
    batch_size = int(config.batch_size or before.identity.get("batch_size") or 64)
    identity: dict[str, Any] = {
        "base": base.identity,
        "input_size": base.input_size,
        "resizer": RESIZER,
        "last_layers": base.last_layers,
        "spec": spec.to_json(),
        "codec": quality.to_json(fit_views),
        "device": compute.device.type,
        "precision": compute.precision,
        "batch_size": batch_size,
        "threads": threads,
        "cache": cache.fingerprint,
    }
    path, what = layout.target_manifest(name), f"target set {name!r}"
    todo = "give the settings as they were, another --name, or --overwrite"
    if dry_run:
        if before.stored is not None and not overwrite:
            require_same(before.identity, identity, what=what, where=store.place(path), todo=todo)
    else:
        if before.replaces:
            lock.own()
            remove_target_set(store, name)
            lock.share()
        if before.stored is None:
            forget_other(store, path, identity, lock, target=name, overwrite=overwrite)
        notes = versions() | device_notes(compute.device) | remembered
        notes |= {"first_row": base.first_row, "facts": [list(fact) for fact in base.facts]}
        ensure_manifest(store, path, identity, notes, what=what, todo=todo)
    base.prepare(compute)
    removes = before.replaces and dry_run
    return TargetJob(name, base, spec, quality, fit_views, batch_size, compute, fingerprint(identity), threads, removes)


def _before(config: ExtractConfig, store: Store, name: str, *, overwrite: bool) -> _Before:
    """Look for the set in the cache. Without a base there must be one."""
    path = layout.target_manifest(name)
    stored = None
    if store.size(path) is not None and (anything_committed(store, name) or config.base is None):
        stored = read_manifest(store, path)
    if config.base is None and stored is None:
        raise ConfigError(f"the cache has no target set {name!r} to go on with", todo="give --base")
    replaces = overwrite and stored is not None
    return _Before(None if replaces and config.base is not None else stored, replaces)


def _load(config: ExtractConfig, cache: Cache, name: str, before: _Before) -> tuple[FrozenBase, dict[str, Any]]:
    """Load the base, and say how to find it again."""
    if config.base is None:
        base_name, weights = base_again(before.notes, config.base_weights, target=name)
    elif config.base_weights is None and still_there(before.notes, config.base):
        base_name, weights = base_again(before.notes, None, target=name)
    else:
        base_name, weights = config.base, config.base_weights
    rows: Any = config.rows
    origin = "--k"
    if rows is None and before.stored:
        rows, origin = before.spec["k"], before.origin(_ROWS) or "as the set was begun"
    elif rows is None:
        rows, origin = "recipe", f"{recipe_of(base_name).source}; --k to change it"
    base = load_base(
        base_name,
        weights,
        grid=cache.grid,
        last_layers=config.last_layers or before.identity.get("last_layers") or 2,
        k=None if rows == "none" else rows,
        class_target=config.class_target or bool(before.spec.get("class_token")),
        given=given_by(config).over(given_before(before.notes)),
    )
    pixels, *others = base.facts
    seen = scaled_crops(int(cache.identity["views"]["size"]), base)
    base.facts = (pixels, *seen, *others, Fact(_ROWS, rows_text(base), origin))
    return base, remember(base_name, weights, base.given)


def _quality(config: ExtractConfig, before: _Before) -> tuple[Quality, int]:
    """Return how exactly targets are kept, and on how many views the codec is fitted."""
    codec = before.identity.get("codec")
    quality = (
        Quality.from_json(codec) if codec and config.quality is None else Quality.parse(config.quality or "default")
    )
    return quality, config.fit_views or (codec or {}).get("fit_views") or DEFAULT_FIT_VIEWS


def rows_text(base: FrozenBase) -> str:
    """Say which rows of the last block's attention are stored."""
    if base.k is None:
        return "not stored"
    first = "the class token" if base.has_class_token else "the mean query"
    if base.k == 0:
        return f"the row of {first}"
    return f"rows of {first} and of {'all patches' if base.k == 'all' else f'its top {base.k}'}"


def scaled_crops(size: int, base: FrozenBase) -> list[Fact]:
    """Say how a base sees crops of `size` pixels per side, where not as they are stored, and what would change that."""
    edge, patch = base.input_size, base.input_size // base.grid
    if size == edge:
        return []
    grid, rest = divmod(size, patch)
    whole = f"--grid {grid}" if rest == 0 and grid >= 2 else f"--size {edge}"
    how = "reduced" if edge < size else "enlarged"
    return [Fact("crops", f"{size} x {size}, {how} to {edge} x {edge}; with {whole} seen as they are", "--size")]
