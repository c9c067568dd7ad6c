"""What a command's settings say of its base, and the model that is to be judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from tec_cache.base.load import load_base, native_grid, random_model
from tec_cache.base.model import FrozenBase
from tec_cache.base.source import Given
from tec_cache.errors import ConfigError
from tec_cache.recipes import BASES

RANDOM = "random:"
"""How the name of an untrained model begins."""


class Settings(Protocol):
    """The settings of any command that loads a base."""

    @property
    def mean(self) -> tuple[float, float, float] | None:
        """Of the pixels."""

    @property
    def std(self) -> tuple[float, float, float] | None:
        """Of the pixels."""

    @property
    def base_args(self) -> dict[str, Any]:
        """Arguments to timm's constructor that no file says."""


def given_by(config: Settings) -> Given:
    """Return the pixel statistics and arguments that were given. Raises ConfigError for any that cannot be meant."""
    return Given.of(config.mean, config.std, config.base_args)


def load_judged(
    name: str, weights: str | Path | None = None, *, grid: int | None = None, given: Given | None = None, seed: int = 0
) -> FrozenBase:
    """Load what is to be judged: `random:NAME`, or anything that `--base` takes, without its attention.

    grid: patches per side; None for the model's own. seed: of a random model. Raises ConfigError and WeightsError.
    """
    if not name.startswith(RANDOM):
        return load_base(name, weights, grid=grid or native_grid(name, weights, given), k=None, given=given)
    if weights:
        raise ConfigError("a random model takes no --weights", todo="leave one of them out")
    name = name.removeprefix(RANDOM)
    if name not in BASES and not Path(name).exists() and not name.startswith("timm:"):
        name = f"timm:{name}"
    return random_model(name, grid=grid or native_grid(name, None, given), seed=seed, given=given)
