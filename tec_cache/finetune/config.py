"""The settings of fine-tuning. Without torch.

None in a recipe's setting means "as the recipe says"; `resolved` fills all of them, and that is what a run keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from tec_cache.conditions import is_used
from tec_cache.errors import ConfigError
from tec_cache.fields import check_interval, check_range, check_share, setting
from tec_cache.finetune.recipes import RECIPES, FinetuneRecipe
from tec_cache.tuning_settings import TuningSettings

# settings of the loop and of the classifier that a recipe has as well, by the same name
OF_RECIPE = ("epochs", "base_lr", "min_lr", "batch_size", "weight_decay", "layer_decay", "drop_path", "mixup",
             "cutmix", "smoothing", "reprob", "auto_augment", "crop_scale", "crop_ratio", "flip", "optimizer",
             "momentum")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuningSettings):
    """Train a classifier on a pretrained encoder, and judge it."""

    TITLE: ClassVar[str] = "Tuning and recipe"
    PROGRAM: ClassVar[str] = "finetune"

    label_field: str | None = setting(
        None,
        "Where the label is: KEY.FIELD of a tar, a field of KEY.json, or a column.  [default: cls, then label]",
    )
    tune: str = setting(
        "full",
        "What is trained beside the head: all of the encoder, nothing, or adapters.",
        choices=("full", "head", "input-adapter", "adapters"),
    )
    rule: str | None = setting(
        None,
        "Whose rules of tuning to follow, MAE's or TEC's.  [default: mae; tec to tune adapters]",
        choices=("mae", "tec"),
    )
    adapters_from: str = setting(
        "pretrained",
        "Adapters to start from: pretrained, random ones (the control), or those of one of several target sets by its "
        "name.",
        words=("pretrained", "random"),
    )
    recipe: str | None = setting(
        None,
        "Named recipe that all settings left out here follow.  [default: chosen by what the model was made of]",
        words=tuple(RECIPES),
    )
    # None until they are resolved
    layer_decay: float | None = setting(
        None, "Factor of the learning rate from each layer to the one below it.  [default: the recipe's]"
    )
    drop_path: float | None = setting(
        None, "Probability that the last block is skipped; it rises to this linearly.  [default: the recipe's]"
    )
    mixup: float = setting(None, "Alpha of mixup, which blends pairs of photos; 0 for none.  [default: the recipe's]")
    cutmix: float = setting(
        None, "Alpha of CutMix, which pastes a part of another photo; 0 for none.  [default: the recipe's]"
    )
    smoothing: float = setting(None, "Share of a label that is spread over all classes.  [default: the recipe's]")
    auto_augment: str | None = setting(
        None,
        "Augmentation policy as timm writes it (rand-m9-mstd0.5-inc1), or none.  [default: the recipe's]",
        words=("none", "rand-m9-mstd0.5-inc1"),
    )
    reprob: float = setting(None, "Probability of erasing a box of a photo.  [default: the recipe's]")
    crop_scale: tuple[float, float] = setting(
        None, "Smallest and largest area of a random crop, as shares of the photo's.  [default: the recipe's]"
    )
    crop_ratio: tuple[float, float] = setting(
        None, "Smallest and largest ratio of the crop's width to its height.  [default: the recipe's]"
    )
    flip: float = setting(None, "Probability of mirroring a photo.  [default: the recipe's]")
    optimizer: str = setting(
        None, "Optimizer of the weights.  [default: the recipe's]", choices=("adamw", "sgd", "lars")
    )
    momentum: float | None = setting(None, "Momentum of sgd and lars.  [default: the recipe's]")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, "mixup", "cutmix")
        if self.auto_augment == "":
            raise ConfigError("--auto-augment is empty", todo="write a policy as timm does, or none")
        check_share(self, "reprob", "flip")
        check_interval(self, "crop_scale", most=1)
        check_interval(self, "crop_ratio")
        check_range(self, 0, "drop_path", "smoothing", "momentum", below=1)
        check_range(self, 0, "layer_decay", open_end=True, below=1.0001)

    def resolved(self, recipe: FinetuneRecipe) -> FinetuneConfig:
        """Fill what was left to a recipe and is used; a warm-up shrinks or grows with the epochs."""
        config = self if self.optimizer is not None else replace(self, optimizer=recipe.optimizer)
        left = [name for name in OF_RECIPE if getattr(config, name) is None and is_used(config, name)]
        config = replace(config, **{name: getattr(recipe, name) for name in left})
        if config.warmup_epochs is None:
            config = replace(config, warmup_epochs=recipe.warmup_epochs * config.epochs / recipe.epochs)
        return config
