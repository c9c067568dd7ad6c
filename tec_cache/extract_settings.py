"""What stage one is told: components that `config.ExtractConfig` is composed of. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tec_cache.fields import setting, table


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """The photos, and the cache that is made of them."""

    TITLE: ClassVar[str] = "Input"

    input: str | None = setting(None, "Photos: tars or parquet files by pattern or folder, or a folder CLASS/NAME.jpg.")
    cache: str = setting("", "Folder or URL of the cache.", required=True)
    limit: int | None = setting(None, "Use only the first N photos.")
    classes: str | None = setting(None, "File of class names, in the order of their numbers.  [default: collected]")
    label_field: str | None = setting(None, "Labels: KEY.FIELD, a field of KEY.json, a column.  [default: cls, label]")
    on_error: str = setting(
        "stop", "What a broken photo or shard does; what is skipped is counted and named.", choices=("stop", "skip")
    )
    part: str | None = setting(None, "Do part I of N, for instance 3/16: one of N independent jobs.")


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """The crops that are stored."""

    TITLE: ClassVar[str] = "Views"

    views: int | None = setting(None, "Views per photo; a larger number adds views.  [default: 4]")
    views_only: bool = setting(False, "Write crops alone; targets can be added later.")
    size: int | None = setting(None, "Pixels per side of a stored crop.  [default: 224]")
    grid: int | None = setting(None, "Patches per side; a base's input is grid * patch.  [default: 14]")
    crop: str | None = setting(
        None, "RandomResizedCrop, or the centre.  [default: random]", choices=("random", "center")
    )
    scale: tuple[float, float] | None = setting(None, "Smallest and largest area of a crop.  [default: 0.2 1.0]")
    flip: float | None = setting(None, "Probability of mirroring a view.  [default: 0.5]")
    seed: int | None = setting(None, "Seed of crop boxes and flips.  [default: 0]")
    jpeg_quality: int | None = setting(None, "Quality of stored crops.  [default: 90]")
    jpeg_subsampling: str | None = setting(None, "Chroma of stored crops: 444, 422 or 420.  [default: 420]")
    group_size: int | None = setting(None, "Photos per unit of work, at most 1024.  [default: 1024]")


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The model whose targets are stored."""

    TITLE: ClassVar[str] = "Base"

    base: str | None = setting(None, "Base model: a known name, timm:NAME, a weight file, or an exported folder.")
    base_weights: str | None = setting(None, "Weight file of the base, in its authors' format or timm's.")
    mean: tuple[float, float, float] | None = setting(None, "Pixel mean of the base.  [default: its release's]")
    std: tuple[float, float, float] | None = setting(None, "Pixel deviation of the base.  [default: its release's]")
    base_args: dict[str, Any] = table("Say what the base's weights cannot: NAME=VALUE (num_heads, act_layer, ...).")


@dataclass(frozen=True, kw_only=True)
class StoredTargetSettings:
    """What is stored of what the base says, and how exactly."""

    TITLE: ClassVar[str] = "Targets"

    name: str | None = setting(None, "Name of the target set.  [default: the base's name]")
    k: str | None = setting(None, "Attention rows beside the class token's: a number, all, none.  [default: base's]")
    class_target: bool = setting(False, "Store the base's class token too (its patches' mean where it has none).")
    normalization: str | None = setting(
        None, "How features are normalized.  [default: patch]", choices=("patch", "feature", "none")
    )
    last_layers: int | None = setting(None, "Blocks whose mean output is the feature target.  [default: 2]")
    quality: str | None = setting(
        None, "Error of stored targets: exact, high, default, small, or MSE,KL.  [default: default]"
    )
    fit_views: int | None = setting(None, "Views from which the codec is fitted.  [default: 512]")


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """On what the base runs. Nothing here changes what is asked for."""

    TITLE: ClassVar[str] = "Speed"

    batch_size: int | None = setting(None, "Views per batch of the base.  [default: 64]")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.")
    precision: str | None = setting(None, "Of the base.  [default: bfloat16 on a GPU]", choices=("float32", "bfloat16"))
    threads: int | None = setting(None, "Threads of the base on a CPU.  [default: all cores]")
    workers: int | None = setting(
        None, "Photos worked on at a time.  [default: all cores, shared by ranks; at most 32]"
    )
