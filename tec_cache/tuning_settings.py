"""What every tuning of a pretrained encoder is told beside the loop's settings: which model, which photos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tec_cache.conditions import require_used
from tec_cache.errors import ConfigError
from tec_cache.fields import changed, check_positive, check_range, setting, table
from tec_cache.loop_settings import LoopSettings


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The encoder that is tuned."""

    TITLE: ClassVar[str] = "Model"

    model: str = setting("", "Exported folder, base name, timm:NAME, weight file, or random:NAME.")
    weights: str | None = setting(None, "Weight file of the model.")
    mean: tuple[float, float, float] | None = setting(None, "Pixel mean of the model.  [default: its release's]")
    std: tuple[float, float, float] | None = setting(None, "Pixel deviation of the model.  [default: its release's]")
    base_args: dict[str, Any] = table("Say what the model's weights cannot: NAME=VALUE (num_heads, ...).")
    grid: int | None = setting(None, "Patches per side.  [default: the model's own]")


@dataclass(frozen=True, kw_only=True)
class PhotoSettings:
    """The photos that are learned from and judged on."""

    TITLE: ClassVar[str] = "Photos and judging"

    train: str = setting("", "Annotated photos to learn from, as for extract.", required=True)
    test: str | None = setting(None, "Annotated photos to be judged on.")
    select: float | None = setting(None, "Judge on this share of --train, held out, instead of --test.")
    classes: str | None = setting(None, "File of class names, in the order of their numbers.  [default: what is found]")
    on_error: str = setting(
        "stop", "What a broken photo does; skip: another of its batch stands in.", choices=("stop", "skip")
    )
    judge_every: int = setting(1, "Epochs between two judgements; the last step is always judged.")


@dataclass(frozen=True, kw_only=True)
class TuningSettings(ModelSettings, PhotoSettings, LoopSettings):
    """What the programs that tune an encoder have in common."""

    PROGRAM: ClassVar[str]
    """The command, for messages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "grid", "judge_every")
        check_range(self, 0, "select", open_end=True, below=1)
        for name in ("model", "train"):
            if not getattr(self, name):
                todo = f"tec-cache {self.PROGRAM} MODEL --train SHARDS --test SHARDS --out RUN"
                raise ConfigError(f"no {name} was named", todo=todo)
        if (self.test is None) == (self.select is None):
            what = "neither --test nor --select was" if self.test is None else "both --test and --select were"
            todo = "give --test SHARDS, or --select 0.1 to choose settings on a part of --train"
            raise ConfigError(f"{what} given", todo=todo)
        require_used(self, changed(self))
