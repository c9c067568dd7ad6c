"""Which source gives a training its targets: the cache, the base in the loop, or the pixels themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from pipelines.loading.base_given import given_by
from pipelines.loading.base_of_set import base_again, given_before, set_meant
from tec_cache.base.facts import require_alike
from tec_cache.base.load import load_base, outline, read_state
from tec_cache.base.model import FrozenBase
from tec_cache.base.source import default_name, find_source
from tec_cache.cache.reader import Cache
from tec_cache.cache.target_set import TargetSet
from tec_cache.config import TrainConfig, parse_rows, wanted_sets
from tec_cache.device import Compute
from tec_cache.errors import ConfigError, WeightsError
from tec_cache.loader import Batch
from tec_cache.paths import exact_name
from tec_cache.printable import counted
from tec_cache.recipes import recipe_of
from tec_cache.targets import normalize_targets
from tec_cache.tasks.targets import CachedTargets, PixelTargets, Sources, TargetSource
from tec_cache.types import Targets, TargetSpec
from tec_cache.weights.files import sha256_of_state


@dataclass
class OnlineTargets:
    """Computed by the base in every step from the same stored crops: the yardstick of caching."""

    base: FrozenBase
    spec: TargetSpec
    tau: float
    compute: Compute
    weight: float = 1.0
    stored: TargetSet | None = None
    weights: str | None = None
    """The base's weight file, where it is one beside its name."""

    def __post_init__(self) -> None:
        self.base.prepare(self.compute)
        self.pixel_size: int | None = self.base.input_size

    def targets(self, batch: Batch, images: torch.Tensor) -> Targets:
        """Run the base on the batch's pixels."""
        inputs = batch.images(self.base.input_size, self.base.mean, self.base.std)
        return normalize_targets(self.base(inputs), self.spec.normalization)

    def identity(self) -> dict[str, Any]:
        """Return the base's identity."""
        return {"kind": "online", "base": self.base.identity, "last_layers": self.base.last_layers}


def choose_targets(config: TrainConfig, cache: Cache, compute: Compute, student_size: int) -> Sources:
    """Make the sources that the settings ask for, by name, or say what the cache cannot give."""
    if config.pixels:
        patch = student_size // cache.grid
        spec = TargetSpec(grid=cache.grid, channels=patch * patch * 3, num_heads=0, k=None, normalization="feature")
        return {"": PixelTargets(spec)}
    if config.online:
        bases = wanted_sets(config.online)
        short = [default_name(base) for base in bases]
        names = short if len(set(short)) == len(short) else list(bases)
        found: dict[str, TargetSource] = {
            name: _online(base, weight, config, cache, compute)
            for name, (base, weight) in zip(names, bases.items(), strict=True)
        }
    else:
        found = {name: _cached(name, weight, config, cache) for name, weight in target_sets(config, cache).items()}
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def target_sets(config: TrainConfig, cache: Cache) -> dict[str, float]:
    """Return the names and weights of the target sets that a training from the cache reads."""
    names = cache.target_names
    if config.target == ("all",) and "all" not in names:
        if not names:
            raise ConfigError("the cache has no target sets", where=config.cache, todo="tec-cache extract --base NAME")
        return dict.fromkeys(names, 1.0)
    if config.target:
        return wanted_sets(config.target)
    if len(names) != 1:
        raise ConfigError(
            f"the cache has {counted(len(names), 'target set')} ({', '.join(names) or 'none'})",
            where=config.cache,
            todo="choose with --target NAME (several times for several, or `all`), or use --online BASE or --pixels",
        )
    return {names[0]: 1.0}


def _online(name: str, weight: float, config: TrainConfig, cache: Cache, compute: Compute) -> OnlineTargets:
    """Load a base to be run in every step: the one of this name, or the one that made the target set of this name."""
    weights, given, meant = config.base_weights, given_by(config), set_meant(name, cache)
    if meant is not None:
        notes = meant.manifest["notes"]
        given = given.over(given_before(notes))
        name, weights = base_again(notes, weights, target=meant.name)
    k, recipe = parse_rows(config.k), recipe_of(name)
    base = load_base(
        name,
        weights,
        grid=cache.grid,
        last_layers=2 if config.last_layers is None else config.last_layers,
        k="recipe" if k is None else None if k == "none" else k,
        class_target=config.class_target and config.class_weight > 0,
        given=given,
    )
    if meant is not None:
        _require_same_weights(base.identity["weights_sha256"], meant.identity["base"], weights or name)
    how: Any = config.normalization or "patch"
    tau = recipe.tau if config.tau is None else config.tau
    return OnlineTargets(base, base.spec(how), tau, compute, weight, weights=weights)


def _cached(name: str, weight: float, config: TrainConfig, cache: Cache) -> CachedTargets:
    """Check the asked settings against what one target set holds."""
    k, stored = parse_rows(config.k), cache[name]
    spec, identity = stored.spec, stored.identity
    asked = {"normalization": config.normalization, "last_layers": config.last_layers}
    have = {"normalization": spec.normalization, "last_layers": identity["last_layers"]}
    for field, value in asked.items():
        if value is not None and value != have[field]:
            raise ConfigError(
                f"{field} {value} was asked for, the target set {stored.name!r} holds {have[field]}",
                todo=f"leave out --{field.replace('_', '-')}, or extract another set with --name",
            )
    if k == "none":
        spec = replace(spec, k=None, num_heads=0)
    elif k is not None:
        if spec.k is None:
            raise ConfigError(
                f"the target set {stored.name!r} holds no attention rows",
                todo="leave out --k, or extract another set with --k and --name",
            )
        rows = spec.num_rows - 1
        if k == "all" and spec.k != "all":
            raise ConfigError(
                f"all rows were asked for, the target set {stored.name!r} holds {rows} beside the class token's",
                todo="extract another set with --k all and --name",
            )
        if k != "all" and k > rows:
            raise ConfigError(
                f"k = {k} was asked for, the target set {stored.name!r} holds {rows}",
                todo=f"train with --k {rows} or less, or extract another set with a larger --k and --name",
            )
        if k not in (0, "all") and spec.k == "all":
            raise ConfigError(
                f"k = {k} was asked for, the target set {stored.name!r} holds all rows in patch order",
                todo="leave out --k, give --k 0, or extract a set of the top rows",
            )
        spec = replace(spec, k=k)
    if config.class_weight == 0:
        spec = replace(spec, class_token=False)
    tau = recipe_of(_base_name(stored)).tau if config.tau is None else config.tau
    return CachedTargets(stored, spec, tau, weight)


def _base_name(stored: TargetSet) -> str:
    return exact_name(str(stored.manifest["notes"]["base"]))


def base_weights_for(config: TrainConfig, sources: Sources, encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Read the base's weights for `--init base`, and check that they are the ones that made the targets.

    encoder: what they are for. Raises WeightsError, also where it would compute something else from the same shapes,
    and ConfigError where there are several bases.
    """
    if len(sources) > 1:
        raise ConfigError("--init base with several target sets: which base?", todo="leave out --init")
    (source,) = sources.values()
    if isinstance(source, OnlineTargets):
        name, weights, identity = source.base.name, source.weights, source.base.identity
    elif source.stored is not None:
        name, weights = base_again(source.stored.manifest["notes"], config.base_weights, target=source.stored.name)
        identity = source.stored.identity["base"]
    else:
        raise ConfigError("--init base needs a base", todo="leave out --pixels")
    state = read_state(find_source(name, weights), name)
    _require_same_weights(sha256_of_state(state), identity, weights or name)
    require_alike(outline(identity["architecture"], identity["model_args"], name), encoder, name)
    return state


def _require_same_weights(sha256: str, identity: dict[str, Any], place: str) -> None:
    """Refuse other weights than those of the base's identity, which made the targets."""
    if sha256 != identity["weights_sha256"]:
        raise WeightsError(
            "these are not the weights of the base that made the targets",
            where=place,
            todo="give the same file as in the extraction with --base-weights",
        )
