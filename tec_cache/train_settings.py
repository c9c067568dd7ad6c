"""What stage two is told beside the loop: components that `config.TrainConfig` is composed of. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tec_cache.fields import Names, pixel_mean, pixel_std, setting, table, untold


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """What the student learns from."""

    TITLE: ClassVar[str] = "Targets"

    cache: str = setting("", "Folder or URL of the cache.", names=Names.CACHE, required=True)
    target: tuple[str, ...] = setting(
        (),
        "Target set to learn from, NAME or NAME:WEIGHT; repeat it for several, or give all.  [default: the only one]",
        words=("all",),
        names=Names.TARGET,
    )
    online: tuple[str, ...] = setting(
        (),
        "Run this base in every step instead of reading targets: a base, or the base of a target set by the set's "
        "name; NAME:WEIGHT, repeated, for several.",
        names=Names.BASE_OR_TARGET,
    )
    pixels: bool = setting(
        False, "Learn from patch-normalized pixels, as a masked autoencoder does; needs neither base nor target set."
    )
    tau: float | None = setting(None, "Temperature of the attention target.  [default: the base's recipe, 1 to 1.8]")
    k: str | None = setting(
        None,
        "Attention rows to learn from beside the class token's: a number up to what is stored, all, or none for no "
        "attention loss.  [default: what is stored]",
        words=("none", "all"),
    )
    class_target: bool = setting(
        False, "With --online, learn from the base's class token too.  [default: where a target set holds it]"
    )
    normalization: str | None = setting(
        None,
        "How features are normalized: each channel over a view's patches, or each patch over its channels (feature).  "
        "[default: as stored; patch with --online]",
        choices=("patch", "feature", "none"),
    )
    last_layers: int | None = setting(
        None,
        "How many of the base's last blocks are averaged into the feature target.  [default: as stored; 2 with "
        "--online]",
    )


@dataclass(frozen=True, kw_only=True)
class OnlineBaseSettings:
    """What is said of a base that runs in the loop."""

    TITLE: ClassVar[str] = "Base in the loop"

    base_weights: str | None = setting(
        None, "Weight file of the base, for --online and --init base.  [default: from timm's hub]", names=Names.WEIGHTS
    )
    mean: tuple[float, float, float] | None = pixel_mean("base")
    std: tuple[float, float, float] | None = pixel_std()
    base_args: dict[str, Any] = untold("base", "num_heads, act_layer")


STUDENTS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
"""Some of timm's plain vision transformers."""


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """The new model."""

    TITLE: ClassVar[str] = "Student"

    student: str = setting("vit_base_patch16_224", "Plain vision transformer of timm to train.", words=STUDENTS)
    student_args: dict[str, Any] = table(
        "Change the student, NAME=VALUE (patch_size, embed_dim, depth, num_heads, ...); may be repeated."
    )
    adapters: str = setting(
        "both",
        "Adapters of the student: one at the input, some in the encoder, both, or none.",
        choices=("both", "input", "encoder", "none"),
    )
    adapters_shared: bool = setting(
        False, "Use one set of encoder adapters for all target sets instead of one for each (an ablation)."
    )
    init: str = setting(
        "random",
        "Weights to start from: random; base, the base's own (an ablation); or the folder of an export (encoder, "
        "adapters) or a run (also decoder and heads), of which all that fits is taken, and reported.",
        words=("random", "base"),
        names=Names.START,
    )
    decoder_depth: int = setting(2, "Blocks of the decoder that all target sets share.")
    decoder_width: int | None = setting(None, "Width of the decoder.  [default: 512; 768 for ViT-L and larger]")
    decoder_heads: int | None = setting(None, "Attention heads of the decoder.  [default: 16]")
    mask_ratio: float = setting(0.75, "Share of the patches that are hidden from the student.")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimized."""

    TITLE: ClassVar[str] = "Losses"

    feature_weight: float = setting(1.0, "Weight of the feature loss.")
    attention_weight: float = setting(1.0, "Weight of the attention loss.")
    class_weight: float = setting(1.0, "Weight of the class-token loss, if there is such a target; 0 leaves it out.")
    balance: str = setting(
        "none",
        "With several target sets: keep the weights as given, or scale them to gradients of equal norm at the encoder.",
        choices=("none", "norm"),
    )


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How the cache is read."""

    TITLE: ClassVar[str] = "Loader"

    partial: bool = setting(False, "Train on the units that are finished now, while the extraction goes on.")
    views: int | None = setting(
        None, "Stored views to use; epoch e reads view number e mod this.  [default: all of them]"
    )
    masks_per_view: int = setting(
        1, "Masks drawn of each view in a step, which then reads batch size / masks views: less reading and decoding."
    )
    shuffle_buffer: int = setting(
        1024, "Views shuffled among each other, in whole blocks of 32; the blocks are shuffled over all of the epoch."
    )
    stage: str | None = setting(
        None,
        "Local folder that keeps copies of what is read from the cache, for all processes of a machine.  [default: no "
        "copies]",
        names=Names.FOLDER,
    )
    stage_bytes: str | None = setting(
        None, "Size limit of the local copies, for instance 200GB or 500MB.  [default: 90 % of the free disk]"
    )
    on_error: str = setting(
        "stop",
        "At a damaged block, or a broken photo of a probe: stop, or skip it; other rows stand in for a block's.",
        choices=("stop", "skip"),
    )
