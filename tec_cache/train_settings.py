"""What stage two is told beside the loop: components that `config.TrainConfig` is composed of. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tec_cache.fields import setting, table


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """What the student learns from."""

    TITLE: ClassVar[str] = "Targets"

    cache: str = setting("", "Folder or URL of the cache.", required=True)
    target: tuple[str, ...] = setting(
        (), "Target set to learn from, NAME or NAME:WEIGHT; again for each of several, or all.  [default: the only one]"
    )
    online: tuple[str, ...] = setting(
        (),
        "Base, or a target set's by its name, in the loop: caching's yardstick; again, NAME:WEIGHT, for several.",
    )
    pixels: bool = setting(False, "Learn from patch-normalized pixels: a masked autoencoder, needs no base.")
    tau: float | None = setting(None, "Temperature of the attention target.  [default: the base's recipe]")
    k: str | None = setting(None, "Attention rows: at most what is stored; none for no attention.  [default: stored]")
    class_target: bool = setting(False, "With --online: the base's class token as a target too.  [default: as stored]")
    normalization: str | None = setting(
        None, "How features are normalized.  [default: stored; patch online]", choices=("patch", "feature", "none")
    )
    last_layers: int | None = setting(None, "Blocks averaged by the base.  [default: stored; 2 online]")


@dataclass(frozen=True, kw_only=True)
class OnlineBaseSettings:
    """What is said of a base in the loop."""

    TITLE: ClassVar[str] = "Base in the loop"

    base_weights: str | None = setting(None, "Weight file of the base, for --online and --init base.")
    mean: tuple[float, float, float] | None = setting(None, "Pixel mean of the base in the loop.  [default: its own]")
    std: tuple[float, float, float] | None = setting(None, "Pixel deviation of it.  [default: its own]")
    base_args: dict[str, Any] = table("Say what the base's weights cannot: NAME=VALUE (num_heads, act_layer, ...).")


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """The new model."""

    TITLE: ClassVar[str] = "Student"

    student: str = setting("vit_base_patch16_224", "Plain vision transformer of timm.")
    student_args: dict[str, Any] = table(
        "Change the student: NAME=VALUE (patch_size, embed_dim, depth, num_heads, ...)."
    )
    adapters: str = setting(
        "both", "Which of the two kinds of adapters the student has.", choices=("both", "input", "encoder", "none")
    )
    adapters_shared: bool = setting(False, "One set of encoder adapters for all target sets (an ablation).")
    init: str = setting(
        "random",
        "random; base: its weights (an ablation); or the folder of an export (encoder, adapters) or of a run (also the "
        "decoder's blocks and heads): what fits is taken, and told.",
    )
    decoder_depth: int = setting(2, "Shared blocks of the decoder.")
    decoder_width: int | None = setting(None, "Width of the decoder.  [default: 512; 768 for ViT-L]")
    decoder_heads: int | None = setting(None, "Heads of the decoder.  [default: 16]")
    mask_ratio: float = setting(0.75, "Share of patches that the student does not see.")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimized."""

    TITLE: ClassVar[str] = "Losses"

    feature_weight: float = setting(1.0, "Weight of the feature loss.")
    attention_weight: float = setting(1.0, "Weight of the attention loss.")
    class_weight: float = setting(1.0, "Weight of the class-token loss, where there is such a target; 0 leaves it out.")
    balance: str = setting(
        "none",
        "Weights of several sets: as given, or for gradients of equal norm at the encoder.",
        choices=("none", "norm"),
    )


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How the cache is read."""

    TITLE: ClassVar[str] = "Loader"

    partial: bool = setting(False, "Train on the units that are finished now, while extraction goes on.")
    views: int | None = setting(None, "Views to use; epoch e reads view e mod views.  [default: all]")
    masks_per_view: int = setting(1, "Masks of one loaded view in a step; a step then reads batch / masks views.")
    shuffle_buffer: int = setting(1024, "Views that are shuffled among each other, in whole blocks of 32.")
    stage: str | None = setting(None, "Local folder for copies of what is read from the cache; shared by a node.")
    stage_bytes: str | None = setting(None, "Most bytes of copies: 200GB, 500MB.  [default: 90 % of the free disk]")
    on_error: str = setting(
        "stop", "What a damaged block does; skip: other rows stand in. A probe's photo too.", choices=("stop", "skip")
    )
