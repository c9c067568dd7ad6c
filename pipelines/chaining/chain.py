"""What each program of each round is told: one training config a round, and one extraction config between two."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.training.target_sources import target_sets
from tec_cache.cache.identity import require_same
from tec_cache.cache.layout import check_name
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.config import ExtractConfig, TrainConfig, wanted_sets
from tec_cache.errors import ConfigError
from tec_cache.pack.reader import Pack
from tec_cache.rounds_config import OF_TARGETS, RoundsConfig
from tec_cache.run.settings import comparable


@dataclass(frozen=True)
class Chain:
    """Rounds with everything resolved that may change in the cache while they run."""

    config: RoundsConfig
    num_views: int
    targets: dict[str, float]
    """Of round 0, with their weights; empty for pixels."""
    settings: dict[str, Any]
    """All that decides the rounds' numbers: another call must give the same."""

    @property
    def folder(self) -> Path:
        """Of all rounds."""
        return Path(self.config.train.out)

    def run(self, number: int) -> Path:
        """Folder of a round's run."""
        return self.folder / round_name(number) / "run"

    def export(self, number: int) -> Path:
        """Folder of a round's exported model."""
        return self.folder / round_name(number) / "export"

    def set_name(self, number: int) -> str:
        """Name of the target set that a round, from number 1 on, learns from."""
        return f"{self.config.set_prefix}-{round_name(number)}"

    def too_old(self, number: int) -> range:
        """Return the rounds whose sets are not kept once a round has finished."""
        return range(1, max(1, number - self.config.keep + 1))

    def training(self, number: int) -> TrainConfig:
        """Return the settings of a round's training.

        Each round has a seed of its own: with the same random weights at its beginning, a model would learn from one
        that began as it does.
        """
        train = self.config.train
        shared: dict[str, Any] = {"out": str(self.run(number)), "seed": train.seed + number, "views": self.num_views}
        if number == 0 and not self.targets:
            return replace(train, pixels=True, tau=None, attention_weight=1.0, class_weight=1.0, **shared)
        sets = {self.set_name(number): 1.0} if number else self.targets
        begins = number > 0 and self.config.start == "previous"
        target = tuple(f"{name}:{weight!r}" for name, weight in sets.items())
        return replace(train, target=target, init=str(self.run(number - 1)) if begins else "random", **shared)

    def extraction(self, number: int) -> ExtractConfig:
        """Return the settings of the extraction of the set that a round learns from: the base is the last export."""
        base, name = str(self.export(number - 1)), self.set_name(number)
        return replace(self.config.extract, base=base, name=name, views=self.num_views)


def round_name(number: int) -> str:
    """Name a round's folder, and what it adds to a set's name."""
    return f"round-{number:02d}"


def resolved(config: RoundsConfig, begun: dict[str, Any] | None) -> Chain:
    """Look at the cache and settle what was left open; what the rounds began with holds where they have begun.

    begun: the settings of the rounds that go on. Raises ConfigError, CacheError, and IdentityError naming the fields
    in which the settings differ from those that the rounds were begun with.
    """
    check_name(config.set_prefix)
    cache = open_cache(config.train.cache)
    if isinstance(cache, Pack):
        raise ConfigError("a pack takes no target sets", where=config.train.cache, todo="tec-cache unpack PACK CACHE")
    num_views = config.train.views or (begun["num_views"] if begun else cache.num_views)
    cache.require_recorded(num_views)
    first = _first_sets(config, cache, begun)
    settings: dict[str, Any] = {
        "cache": cache.fingerprint,
        "num_views": num_views,
        "pixels": config.pixels,
        "targets": first,
        "start": config.start,
        "name": config.set_prefix,
        "tau": config.train.tau,
        "train": comparable({"task": "pretrain", "config": asdict(config.train)})["config"],
        "extract": {name: getattr(config.extract, name) for name in (*OF_TARGETS, "batch_size")},
    }
    if begun is not None:
        todo = "give the settings as they were, or another --out"
        require_same(begun, settings, what="this folder of rounds", where=config.train.out, todo=todo)
    return Chain(config, num_views, {of["name"]: of["weight"] for of in first}, settings)


def _first_sets(config: RoundsConfig, cache: Cache, begun: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return names, weights and fingerprints of the sets that round 0 learns from; none for pixels.

    A set that is gone by now counts as the one that it was: whoever reads it next will miss it.
    """
    if config.pixels:
        return []
    known = {of["name"]: of for of in begun["targets"]} if begun else {}
    if config.target and config.target != ("all",):
        sets = wanted_sets(config.target)
    elif known:
        sets = {name: of["weight"] for name, of in known.items()}
    else:
        sets = target_sets(replace(config.train, target=config.target), cache)
    missing = [name for name in sets if name not in cache.target_names and name not in known]
    if missing:
        todo = f"it has: {', '.join(cache.target_names) or 'none'}; or begin with --pixels"
        raise ConfigError(f"there is no target set {missing[0]!r}", where=config.train.cache, todo=todo)
    there = {name: cache[name].fingerprint for name in sets if name in cache.target_names}
    return [
        {"name": name, "weight": weight, "fingerprint": there.get(name) or known[name]["fingerprint"]}
        for name, weight in sets.items()
    ]
