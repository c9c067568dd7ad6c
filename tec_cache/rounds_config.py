"""The settings of rounds: each new model the base of the next one. Without torch, filled as the other configs are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tec_cache.conditions import require_used
from tec_cache.config import ExtractConfig, TrainConfig, wanted_sets
from tec_cache.errors import ConfigError
from tec_cache.fields import Names, changed, check_choices, check_positive, check_range, setting

NOT_OF_ROUNDS = ("online", "base_weights", "mean", "std", "base_args", "init", "partial", "steps", "k", "normalization",
                 "last_layers", "class_target")  # fmt: skip
"""Settings of a training that rounds have not: what they decide themselves, or say of the targets between."""
FIRST = ("target", "pixels")
"""Settings of a training that are the first round's alone."""
OF_TARGETS = ("k", "class_target", "normalization", "last_layers", "quality", "fit_views")
"""Settings of an extraction that hold for the targets of every round."""


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """What every round's training and every extraction between two of them is told."""

    TITLE: ClassVar[str] = "Rounds"

    train: TrainConfig
    """Its cache and epochs are every round's, its `out` the folder of all; each round's seed is its plus the number."""
    extract: ExtractConfig
    """Of it, only how the targets of a round are made and coded."""
    target: tuple[str, ...] = setting(
        (),
        "Target set that round 0 learns from, NAME or NAME:WEIGHT; repeat it for several.  [default: the only one]",
        names=Names.TARGET,
    )
    pixels: bool = setting(
        False, "Let round 0 learn from pixels, as a masked autoencoder does; needs neither base nor target set."
    )
    rounds: int = setting(2, "Number of trainings, counting round 0; may be raised later.")
    start: str = setting(
        "random",
        "Weights that each next round starts from: new random ones (as in the paper), or the last round's.",
        choices=("random", "previous"),
    )
    keep: int = setting(
        1, "How many of the rounds' target sets to keep; older ones are removed when the next round has finished."
    )
    name: str | None = setting(
        None, "How the names of the rounds' target sets begin: NAME-round-01, ...  [default: the last part of --out]"
    )
    seconds: float = setting(20.0, "With --dry-run: seconds to measure for; loading the models comes on top.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "rounds")
        check_range(self, 0, "keep")
        check_range(self, 0, "seconds", open_end=True)
        wanted_sets(self.target)
        if self.target and self.pixels:
            raise ConfigError("--target and --pixels for round 0", todo="give one of them")
        if self.rounds > MOST_ROUNDS:
            raise ConfigError(f"--rounds {self.rounds}", todo=f"give at most {MOST_ROUNDS}")
        given = [name for name in changed(self.train) if name in (*NOT_OF_ROUNDS, *FIRST)]
        if given:
            raise ConfigError(f"rounds have no setting {', '.join(given)} of a training", todo="leave it out")
        require_used(self, [name for name in changed(self) if name not in ("train", "extract")])

    @property
    def set_prefix(self) -> str:
        """How the names of the rounds' target sets begin."""
        return self.name or Path(self.train.out).name


MOST_ROUNDS = 100
"""Two digits number them."""
