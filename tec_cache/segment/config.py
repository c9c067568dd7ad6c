"""The settings of segmentation. Without torch.

None in a recipe's setting means "as the recipe says"; `resolved` fills all of them, and that is what a run keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from tec_cache.conditions import is_used
from tec_cache.errors import ConfigError
from tec_cache.fields import Names, check_interval, check_range, check_share, setting, varied
from tec_cache.loop_settings import LoopSettings
from tec_cache.segment.recipes import RECIPES, SegmentRecipe
from tec_cache.store import is_url
from tec_cache.tuning_settings import TuningSettings

# settings of the loop and of the segmenter that a recipe has as well, by the same name
OF_RECIPE = ("head", "ignore", "epochs", "base_lr", "min_lr", "schedule", "batch_size", "weight_decay", "layer_decay",
             "drop_path", "crop_scale", "jitter", "colour", "grey", "blur")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(TuningSettings):
    """Train a pretrained encoder to say the class of each pixel, and judge it."""

    TITLE: ClassVar[str] = "Segmentation and recipe"
    PROGRAM: ClassVar[str] = "segment"

    ignore: int = setting(None, "Mask value of pixels that are neither learned nor judged.  [default: the recipe's]")
    head: str = setting(
        None,
        "Head on the encoder: a norm and a 1 x 1 convolution (linear), or UPerNet.  [default: the recipe's]",
        choices=("linear", "upernet"),
    )
    tune: str = setting(
        "full", "What is trained: everything, or the head on a frozen encoder.", choices=("full", "head")
    )
    recipe: str | None = setting(
        None,
        "Named recipe that all settings left out here follow.  [default: chosen by head and number of photos]",
        words=tuple(RECIPES),
    )
    layer_decay: float | None = setting(
        None, "Factor of the learning rate from each layer to the one below it.  [default: the recipe's]"
    )
    drop_path: float | None = setting(
        None, "Probability that the last block is skipped; it rises to this linearly.  [default: the recipe's]"
    )
    crop_scale: tuple[float, float] | None = setting(
        None, "Smallest and largest area of a random crop, as shares of the photo's.  [default: the recipe's]"
    )
    jitter: tuple[float, float] | None = setting(
        None,
        "Smallest and largest factor by which the shorter side of a photo is scaled to the crop's side before it is "
        "cropped.  [default: the recipe's]",
    )
    colour: tuple[float, float, float, float] | None = setting(
        None, "Strength of the jitter of brightness, contrast, saturation and hue.  [default: the recipe's]"
    )
    grey: float = setting(None, "Probability of turning a photo grey.  [default: the recipe's]")
    blur: float = setting(None, "Probability of blurring a photo.  [default: the recipe's]")
    save_predictions: str | None = setting(
        None,
        "Folder for the predicted masks and pictures of them.  [default: not written]",
        names=Names.FOLDER,
    )
    # the loop's, None until it is resolved
    schedule: str = varied(LoopSettings, "schedule", None, "the recipe's")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, "ignore")
        check_share(self, "grey", "blur")
        check_interval(self, "crop_scale", most=1)
        check_interval(self, "jitter")
        if self.colour is not None and not (all(0 <= c < math.inf for c in self.colour) and self.colour[3] <= 0.5):
            given = " ".join(f"{c:g}" for c in self.colour)
            raise ConfigError(f"--colour {given}", todo="give four numbers of at least 0, the hue's 0.5 at most")
        if self.save_predictions is not None and is_url(self.save_predictions):
            where = self.save_predictions
            raise ConfigError("--save-predictions is no local folder", where=where, todo="give a folder of a disk")
        check_range(self, 0, "drop_path", below=1)
        check_range(self, 0, "layer_decay", open_end=True, below=1.0001)

    def resolved(self, recipe: SegmentRecipe) -> SegmentConfig:
        """Fill what was left to a recipe and is used; a warm-up shrinks or grows with the epochs."""
        other = "crop_scale" if recipe.crop == "jittered" else "jitter"
        if getattr(self, other) is not None:
            option = "--" + other.replace("_", "-")
            raise ConfigError(f"not used: {option}; photos of this recipe are {recipe.crop}", todo="leave it out")
        names = [name for name in OF_RECIPE if name != other]
        left = [name for name in names if getattr(self, name) is None and is_used(self, name)]
        config = replace(self, **{name: getattr(recipe, name) for name in left})
        if config.warmup_epochs is None:
            config = replace(config, warmup_epochs=recipe.warmup_epochs * config.epochs / recipe.epochs)
        return config
