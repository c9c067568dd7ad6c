"""The settings of fine-tuning. Without torch.

None in a recipe's setting means "as the recipe says"; `resolved` fills all of them, and that is what a run keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from tec_cache.conditions import is_used, require_used
from tec_cache.errors import ConfigError
from tec_cache.fields import changed, check_choice, check_positive, check_range, setting, varied
from tec_cache.finetune.recipes import FinetuneRecipe
from tec_cache.loop_settings import LoopSettings

# settings of the loop and of the classifier that a recipe has as well, by the same name
OF_RECIPE = ("epochs", "base_lr", "min_lr", "batch_size", "weight_decay", "layer_decay", "drop_path", "mixup",
             "cutmix", "smoothing", "optimizer", "momentum")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopSettings):
    """Train a classifier on a pretrained encoder, and judge it."""

    TITLE: ClassVar[str] = "Model, photos and recipe"

    model: str = setting("", "Exported folder, base name, timm:NAME, weight file, or random:NAME.")
    train: str = setting("", "Labelled photos to learn from, as for extract.")
    test: str | None = setting(None, "Labelled photos to be judged on.")
    select: float | None = setting(None, "Judge on this share of --train, held out, instead of --test.")
    weights: str | None = setting(None, "Weight file of the model.")
    mean: tuple[float, float, float] | None = setting(None, "Pixel mean of the model.  [default: its release's]")
    std: tuple[float, float, float] | None = setting(None, "Pixel deviation of the model.  [default: its release's]")
    base_args: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Say what the model's weights cannot: NAME=VALUE (num_heads, ...)."}
    )
    grid: int | None = setting(None, "Patches per side.  [default: the model's own]")
    classes: str | None = setting(None, "File of class names, in the order of their numbers.  [default: collected]")
    label_field: str | None = setting(None, "Labels of tars: in KEY.FIELD, or in a field of KEY.json.  [default: cls]")
    tune: str = setting("full", "full, head, input-adapter or adapters.")
    rule: str | None = setting(None, "mae or tec: whose rules.  [default: mae; tec where adapters are tuned]")
    adapters_from: str = setting("pretrained", "pretrained, or random: the control.")
    recipe: str | None = setting(None, "Recipe by name.  [default: by what the model was made of]")
    # None until they are resolved
    layer_decay: float | None = setting(None, "Of the learning rate from a layer to the one below.")
    drop_path: float | None = setting(None, "Highest chance of a block's being skipped.")
    mixup: float = setting(None, "Alpha of mixup; 0 for none.")
    cutmix: float = setting(None, "Alpha of cutmix; 0 for none.")
    smoothing: float = setting(None, "Label smoothing.")
    optimizer: str = setting(None, "adamw, sgd or lars.")
    momentum: float | None = setting(None, "Of sgd and lars.")
    on_error: str = setting("stop", "What a broken photo does: stop, or skip (another of its batch stands in).")
    # the loop's, None until they are resolved
    epochs: int = varied(LoopSettings, "epochs", None)
    base_lr: float = varied(LoopSettings, "base_lr", None)
    min_lr: float = varied(LoopSettings, "min_lr", None)
    batch_size: int = varied(LoopSettings, "batch_size", None)
    weight_decay: float = varied(LoopSettings, "weight_decay", None)
    beta2: float = varied(LoopSettings, "beta2", 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tune", self.tune, ("full", "head", "input-adapter", "adapters"))
        check_choice("rule", self.rule, ("mae", "tec"))
        check_choice("adapters_from", self.adapters_from, ("pretrained", "random"))
        check_choice("on_error", self.on_error, ("stop", "skip"))
        check_choice("optimizer", self.optimizer, ("adamw", "sgd", "lars"))
        check_positive(self, "grid")
        check_range(self, 0, "mixup", "cutmix")
        check_range(self, 0, "drop_path", "smoothing", "momentum", below=1)
        check_range(self, 0, "layer_decay", open_end=True, below=1.0001)
        check_range(self, 0, "select", open_end=True, below=1)
        for name in ("model", "train"):
            if not getattr(self, name):
                raise ConfigError(f"no {name} was named", todo="tec-cache finetune MODEL --train SHARDS --test SHARDS")
        if (self.test is None) == (self.select is None):
            what = "neither --test nor --select was" if self.test is None else "both --test and --select were"
            todo = "give --test SHARDS, or --select 0.1 to choose settings on a part of --train"
            raise ConfigError(f"{what} given", todo=todo)
        require_used(self, changed(self))

    def resolved(self, recipe: FinetuneRecipe) -> FinetuneConfig:
        """Fill what was left to a recipe and is used; a warm-up shrinks or grows with the epochs."""
        config = self if self.optimizer is not None else replace(self, optimizer=recipe.optimizer)
        left = [name for name in OF_RECIPE if getattr(config, name) is None and is_used(config, name)]
        config = replace(config, **{name: getattr(recipe, name) for name in left})
        if config.warmup_epochs is None:
            config = replace(config, warmup_epochs=recipe.warmup_epochs * config.epochs / recipe.epochs)
        return config
