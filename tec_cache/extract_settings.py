"""What stage one is told: components that `config.ExtractConfig` is composed of. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tec_cache.codec.quality import qualities
from tec_cache.fields import DEVICES, Names, pixel_mean, pixel_std, setting, untold


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """The photos, and the cache that is made of them."""

    TITLE: ClassVar[str] = "Input"

    input: str | None = setting(
        None, "Photos: tars or parquet files by pattern or folder, or a folder CLASS/NAME.jpg.", names=Names.PHOTOS
    )
    cache: str = setting("", "Folder or URL of the cache.", names=Names.CACHE, required=True)
    limit: int | None = setting(None, "Use only the first N photos.  [default: all]")
    classes: str | None = setting(
        None,
        "File with one class name per line, in the order of their numbers.  [default: the names found, sorted]",
        names=Names.FILE,
    )
    label_field: str | None = setting(
        None,
        "Where the label is: KEY.FIELD of a tar, a field of KEY.json, or a column.  [default: cls, then label]",
    )
    on_error: str = setting(
        "stop",
        "At a broken photo or shard: stop, or skip it; what is skipped is counted and named.",
        choices=("stop", "skip"),
    )
    part: str | None = setting(
        None, "Do only part I of N, written I/N (3/16): each of N jobs takes one.  [default: everything]"
    )


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """The crops that are stored."""

    TITLE: ClassVar[str] = "Views"

    views: int | None = setting(None, "Crops stored of each photo; a larger number adds some.  [default: 4]")
    views_only: bool = setting(False, "Store crops without targets, which can be added later.")
    size: int | None = setting(None, "Side of a stored crop in pixels.  [default: 224]")
    grid: int | None = setting(
        None, "Patches per side; the base sees a crop at grid x patch size pixels.  [default: 14]"
    )
    crop: str | None = setting(
        None,
        "How a view is cut: a random resized crop, or the photo's centre.  [default: random]",
        choices=("random", "center"),
    )
    scale: tuple[float, float] | None = setting(
        None, "Smallest and largest area of a random crop, as shares of the photo's.  [default: 0.2 1.0]"
    )
    flip: float | None = setting(None, "Probability of mirroring a view.  [default: 0.5]")
    seed: int | None = setting(None, "Seed of crop boxes and flips.  [default: 0]")
    jpeg_quality: int | None = setting(None, "JPEG quality of stored crops, 1 to 100.  [default: 90]")
    jpeg_subsampling: str | None = setting(
        None,
        "Chroma subsampling of stored crops; 444 keeps all colour.  [default: 420, the smallest]",
        choices=("444", "422", "420"),
    )
    group_size: int | None = setting(
        None, "Photos per unit, the smallest piece of work that is kept; at most 1024.  [default: 1024]"
    )


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The model whose targets are stored."""

    TITLE: ClassVar[str] = "Base"

    base: str | None = setting(
        None, "Base model: a known name, timm:NAME, a weight file, or a model's folder.", names=Names.BASE
    )
    base_weights: str | None = setting(
        None,
        "Weight file of the base, in its authors' format, timm's or transformers'.  [default: from timm's hub]",
        names=Names.WEIGHTS,
    )
    mean: tuple[float, float, float] | None = pixel_mean("base")
    std: tuple[float, float, float] | None = pixel_std()
    base_args: dict[str, Any] = untold("base", "num_heads, act_layer")


@dataclass(frozen=True, kw_only=True)
class StoredTargetSettings:
    """What of the base's output is stored, and how exactly."""

    TITLE: ClassVar[str] = "Targets"

    name: str | None = setting(None, "Name of the target set.  [default: the base's name]", names=Names.TARGET)
    k: str | None = setting(
        None,
        "Patches whose attention rows are stored beside the class token's: a number from 0, all, or none for no "
        "attention target.  [default: the base's recipe, 9 or 15]",
        words=("none", "all"),
    )
    class_target: bool = setting(
        False, "Store the base's class token too (the mean of the patches, if the base has none)."
    )
    normalization: str | None = setting(
        None,
        "How features are normalized: each channel over a view's patches, or each patch over its channels (feature).  "
        "[default: patch]",
        choices=("patch", "feature", "none"),
    )
    last_layers: int | None = setting(
        None, "How many of the base's last blocks are averaged into the feature target.  [default: 2]"
    )
    quality: str | None = setting(
        None,
        "Error allowed in stored targets: exact, high, default, small, or two numbers MSE,KL; more error takes less "
        "disk.  [default: default]",
        words=tuple(qualities()),
    )
    fit_views: int | None = setting(
        None, "Views that the codec is fitted on; more make smaller targets.  [default: 512]"
    )


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """Where and how fast the base runs. None of it changes what is stored beyond rounding."""

    TITLE: ClassVar[str] = "Speed"

    batch_size: int | None = setting(None, "Views per batch of the base.  [default: 64]")
    device: str = setting("auto", "Where the base runs: auto, cpu, cuda or cuda:N.", words=DEVICES)
    precision: str | None = setting(
        None,
        "Number format of the base.  [default: bfloat16 on a GPU, float32 on a CPU]",
        choices=("float32", "bfloat16"),
    )
    threads: int | None = setting(None, "CPU threads of the base.  [default: all cores]")
    workers: int | None = setting(
        None, "Photos decoded and cropped at a time.  [default: all cores, shared by the ranks; at most 32]"
    )
