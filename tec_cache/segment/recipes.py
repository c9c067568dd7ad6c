"""The settings of segmentation by name, and which of them a task asks for. Plain tables without torch.

Sources: ImageNetSegModel's program and the ImageNet-S paper; mmsegmentation's configuration of MAE on ADE20K.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from tec_cache.errors import ConfigError, nearest
from tec_cache.printable import counted

Head = Literal["linear", "upernet"]
FEW_IMAGES = 5_000
"""Below, the published recipes are not taken unasked."""


@dataclass(frozen=True, kw_only=True)
class SegmentRecipe:
    """One way of training for segmentation. The peak learning rate is base_lr * batch_size / 256 * a group's scale."""

    source: str
    """Who says so, and what of it nobody says."""
    head: Head
    epochs: int
    warmup_epochs: float
    base_lr: float
    batch_size: int
    layer_decay: float
    min_lr: float = 1e-6
    schedule: str = "cosine"
    weight_decay: float = 0.05
    drop_path: float = 0.1
    size: int | None = None
    """Pixels per side that are trained on; None: the model's own."""
    ignore: int = 255
    """Value of masks that means that nothing is known."""
    crop: Literal["resized", "jittered"] = "resized"
    """resized: a random part of the photo of `crop_scale` of its area, 3/4 to 4/3 wide, scaled to the training size.
    jittered: the photo scaled by `jitter` times the training size, and a square of that cut; no class above 3/4."""
    crop_scale: tuple[float, float] = (0.14, 1.0)
    jitter: tuple[float, float] = (0.5, 2.0)
    colour: tuple[float, float, float, float] | None = (0.8, 0.8, 0.8, 0.2)
    """Jitter of brightness, contrast, saturation and hue of four in five photos; None: mmsegmentation's distortion."""
    grey: float = 0.2
    """Chance of a photo without colours."""
    blur: float = 0.5
    """Chance of a blurred photo, by 0.1 to 2 pixels."""


_IMAGENET_S = SegmentRecipe(
    source="ImageNetSegModel's program for a model without labels; TEC's own layer decay is not published",
    head="linear",
    epochs=100,
    warmup_epochs=5,
    base_lr=5e-4,
    batch_size=256,
    layer_decay=0.60,
    size=224,
    ignore=1000,
)

RECIPES: dict[str, SegmentRecipe] = {
    "imagenet-s": _IMAGENET_S,
    "imagenet-s-ft": replace(
        _IMAGENET_S,
        source="ImageNetSegModel's program for a model that was fine-tuned with labels first",
        base_lr=1e-4,
        layer_decay=0.40,
    ),
    "ade20k": SegmentRecipe(
        source="mmsegmentation's configuration of MAE: 160,000 steps of 16 photos are 127 epochs of ADE20K's 20,210",
        head="upernet",
        epochs=127,
        warmup_epochs=1.19,
        base_lr=1.6e-3,
        batch_size=16,
        layer_decay=0.65,
        min_lr=0.0,
        schedule="linear",
        size=512,
        ignore=0,
        crop="jittered",
        colour=None,
        grey=0.0,
        blur=0.0,
    ),
    "small": SegmentRecipe(
        source="this project's choice for a few hundred or thousand photos, not tuned",
        head="linear",
        epochs=40,
        warmup_epochs=4,
        base_lr=4e-3,
        batch_size=16,
        layer_decay=0.75,
        drop_path=0.0,
        crop_scale=(0.25, 1.0),
        colour=(0.4, 0.4, 0.4, 0.1),
        grey=0.0,
        blur=0.0,
    ),
}


class Chosen(NamedTuple):
    """A recipe, and why it is this one."""

    name: str
    recipe: SegmentRecipe
    why: str


def recipe_for(name: str | None, head: Head | None, num_images: int) -> Chosen:
    """Return the recipe that was named, or the one that goes with the head and the number of photos. ConfigError."""
    if name is not None:
        if name not in RECIPES:
            raise ConfigError(f"unknown recipe {name!r}{nearest(name, RECIPES)}", todo=f"one of {', '.join(RECIPES)}")
        return Chosen(name, RECIPES[name], "it was asked for")
    if num_images < FEW_IMAGES:
        return Chosen(
            "small", RECIPES["small"], f"{counted(num_images, 'photo')}; the published recipes have many more"
        )
    found = "ade20k" if head == "upernet" else "imagenet-s"
    return Chosen(found, RECIPES[found], f"the published one with the head {head or 'linear'}")
