"""What every tuning of a pretrained encoder is told beside the loop's settings: which model, which photos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tec_cache.conditions import require_used
from tec_cache.errors import ConfigError
from tec_cache.fields import Names, changed, check_positive, check_range, pixel_mean, pixel_std, setting, untold, varied
from tec_cache.loop_settings import LoopSettings


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The encoder that is tuned."""

    TITLE: ClassVar[str] = "Model"

    model: str = setting("", "Exported folder, base name, timm:NAME, weight file, or random:NAME.", names=Names.BASE)
    weights: str | None = setting(
        None, "Weight file of the model, where MODEL names none.  [default: from timm's hub]", names=Names.WEIGHTS
    )
    mean: tuple[float, float, float] | None = pixel_mean("model")
    std: tuple[float, float, float] | None = pixel_std()
    base_args: dict[str, Any] = untold("model", "num_heads")
    grid: int | None = setting(None, "Patches per side of the photos that the model sees.  [default: the model's own]")


@dataclass(frozen=True, kw_only=True)
class PhotoSettings:
    """The photos that are learned from and judged on."""

    TITLE: ClassVar[str] = "Photos and judging"

    train: str = setting("", "Annotated photos to learn from, as for extract.", names=Names.PHOTOS, required=True)
    test: str | None = setting(None, "Annotated photos to judge the model on.", names=Names.PHOTOS)
    select: float | None = setting(None, "Share of --train to hold out and judge on, instead of --test.")
    classes: str | None = setting(
        None,
        "File with one class name per line, in the order of their numbers.  [default: the names found, sorted]",
        names=Names.FILE,
    )
    on_error: str = setting(
        "stop", "At a broken photo: stop, or skip it; another of its batch stands in.", choices=("stop", "skip")
    )
    judge_every: int = setting(1, "Epochs between two judgements; the last step is always judged.")


@dataclass(frozen=True, kw_only=True)
class TuningSettings(ModelSettings, PhotoSettings, LoopSettings):
    """What the programs that tune an encoder have in common."""

    PROGRAM: ClassVar[str]
    """The command, for messages."""

    # the loop's, None until they are resolved
    epochs: int = varied(LoopSettings, "epochs", None, "the recipe's")
    warmup_epochs: float | None = varied(LoopSettings, "warmup_epochs", None, "the recipe's share of --epochs")
    base_lr: float = varied(LoopSettings, "base_lr", None, "the recipe's")
    min_lr: float = varied(LoopSettings, "min_lr", None, "the recipe's")
    batch_size: int = varied(LoopSettings, "batch_size", None, "the recipe's")
    weight_decay: float = varied(LoopSettings, "weight_decay", None, "the recipe's")
    beta2: float = varied(LoopSettings, "beta2", 0.999)

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
