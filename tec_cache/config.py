"""The settings of each stage: a frozen dataclass for each stage, without torch, filled by the command line or by hand.

`None` in an extraction means "as in the cache, or the default where there is none yet", so that a command that
goes on with a cache need not repeat how it was made. What is given and differs from the cache is refused.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tec_cache.cache.layout import MOST_VIEWS
from tec_cache.codec.quality import Quality
from tec_cache.conditions import require_used
from tec_cache.errors import ConfigError, nearest
from tec_cache.extract_settings import (
    BaseSettings,
    InputSettings,
    SpeedSettings,
    StoredTargetSettings,
    ViewSettings,
)
from tec_cache.fields import (
    DEVICES,
    Names,
    changed,
    check_choices,
    check_positive,
    check_range,
    expand_paths,
    pixel_mean,
    pixel_std,
    setting,
    untold,
)
from tec_cache.judgement_settings import JudgementSettings
from tec_cache.loop_settings import LoopSettings
from tec_cache.store import is_url
from tec_cache.train_settings import (
    LoaderSettings,
    LossSettings,
    OnlineBaseSettings,
    StudentSettings,
    TargetSettings,
)

AskedRows = int | Literal["all", "none"]
"""What --k asks for: so many rows of attention beside the class token's, all, or no attention target."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(InputSettings, ViewSettings, BaseSettings, StoredTargetSettings, SpeedSettings):
    """Stage one: photos to views, views to targets."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_choices(self)
        if self.quality is not None:
            Quality.parse(self.quality)
        parse_part(self.part)
        check_positive(self, "views", "size", "limit", "batch_size", "threads", "workers", "last_layers", "group_size")
        check_positive(self, "fit_views")
        if not self.cache:
            raise ConfigError("no cache was named", todo="give --cache DIR")
        if self.grid is not None and self.grid < 2:
            raise ConfigError(f"--grid {self.grid}", todo="give at least 2 patches per side")
        if self.views is not None and self.views > MOST_VIEWS:
            raise ConfigError(f"--views {self.views}", todo=f"give at most {MOST_VIEWS:,}")
        if self.group_size is not None and self.group_size > 1024:
            raise ConfigError(f"--group-size {self.group_size}", todo="give at most 1024")
        parse_rows(self.k)
        require_used(self, changed(self))

    @property
    def rows(self) -> AskedRows | None:
        """Attention rows that were asked for; None where nothing was said."""
        return parse_rows(self.k)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    TargetSettings, OnlineBaseSettings, StudentSettings, LossSettings, LoaderSettings, JudgementSettings, LoopSettings
):
    """Stage two: a new ViT from the cache. Defaults are the paper's pretraining recipe."""

    def __post_init__(self) -> None:
        for name in ("target", "online"):
            value = getattr(self, name)
            if isinstance(value, str):  # one name is a list of one
                object.__setattr__(self, name, (value,))
            wanted_sets(getattr(self, name))
        super().__post_init__()
        self.check_judgement()
        if not self.init:
            raise ConfigError("--init is empty", todo="give random, base, or the folder of an export or a run")
        check_positive(self, "views", "decoder_width", "decoder_heads", "last_layers")
        check_positive(self, "masks_per_view", "shuffle_buffer")
        check_range(self, 0, "decoder_depth")
        check_range(self, 0, "feature_weight", "attention_weight", "class_weight")
        check_range(self, 0, "tau", open_end=True)
        if self.feature_weight == self.attention_weight == 0:
            raise ConfigError("both losses have the weight 0", todo="give one of them a weight")
        if not self.cache:
            raise ConfigError("no cache was named", todo="give --cache DIR")
        if sum((bool(self.target), bool(self.online), self.pixels)) > 1:
            raise ConfigError(
                "several kinds of targets were asked for",
                todo="give --target NAME, --online BASE or --pixels",
            )
        if self.init == "base" and self.pixels:
            raise ConfigError("--init base needs a base", todo="leave out --pixels or --init")
        if self.stage is not None and is_url(self.stage):
            raise ConfigError("--stage is no local folder", where=self.stage, todo="give --stage a folder of a disk")
        parse_bytes(self.stage_bytes)
        parse_rows(self.k)
        require_used(self, changed(self))

    @property
    def rows(self) -> AskedRows | None:
        """Attention rows that were asked for; None where nothing was said."""
        return parse_rows(self.k)

    @property
    def rows_together(self) -> int:
        """Number of masks of one view in a step."""
        return self.masks_per_view


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Judge frozen features: k nearest neighbours and a linear classifier."""

    model: str = setting("", "Exported folder, base name, timm:NAME, weight file, or random:NAME.", names=Names.BASE)
    train: str = setting(
        "",
        "Labelled photos to learn from, as for extract, or a cache folder: its stored crops.",
        names=Names.LABELLED,
        required=True,
    )
    test: str = setting(
        "", "Labelled photos to judge the model on, or a cache folder.", names=Names.LABELLED, required=True
    )
    weights: str | None = setting(
        None, "Weight file of the model, where MODEL names none.  [default: from timm's hub]", names=Names.WEIGHTS
    )
    mean: tuple[float, float, float] | None = pixel_mean("model")
    std: tuple[float, float, float] | None = pixel_std()
    base_args: dict[str, Any] = untold("model", "num_heads")
    grid: int | None = setting(None, "Patches per side of the photos that the model sees.  [default: the model's own]")
    pool: str = setting(
        "patches",
        "Feature of a photo that is judged: the mean of its patches, or the class token.",
        choices=("patches", "class"),
    )
    neighbours: int = setting(20, "Neighbours that vote for a photo's class.")
    batch_size: int = setting(128, "Photos per batch of the model.")
    limit: int | None = setting(None, "Use only the first N photos of --train and of --test.  [default: all]")
    l2: float = setting(1e-4, "Penalty on the linear classifier's weights.")
    device: str = setting("auto", "Where the model runs: auto, cpu, cuda or cuda:N.", words=DEVICES)
    precision: str = setting(
        "auto", "Number format of the model; auto is bfloat16 on a GPU.", choices=("auto", "float32", "bfloat16")
    )
    workers: int | None = setting(None, "Threads that decode photos.  [default: all cores]")
    on_error: str = setting("stop", "At a broken photo: stop, or leave it out and count it.", choices=("stop", "skip"))

    def __post_init__(self) -> None:
        expand_paths(self)
        check_choices(self)
        check_positive(self, "neighbours", "batch_size", "limit", "workers", "grid")
        for name in ("model", "train", "test"):
            if not getattr(self, name):
                raise ConfigError(f"no {name} was named", todo="tec-cache probe MODEL --train SHARDS --test SHARDS")
        require_used(self, changed(self))


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What to plan: an extraction, the trainings that use it, and how long to measure."""

    extract: ExtractConfig
    train: TrainConfig
    """Its cache and out are not looked at."""
    images: int | None = setting(
        None, "Number of photos of the whole job, where INPUT is a part of them.  [default: counted]"
    )
    seconds: float = setting(
        20.0, "Seconds to measure for, about; loading the models and the fewest views of each measurement come on top."
    )

    def __post_init__(self) -> None:
        check_positive(self, "images")
        check_range(self, 0, "seconds", open_end=True)
        # that a training is planned cannot be told from its default settings
        require_used(self, [name for name in changed(self) if name != "train"])


def parse_part(text: str | None) -> tuple[int, int]:
    """Read I/N, counted from 1, as (I - 1, N); None is the whole."""
    if text is None:
        return 0, 1
    first, slash, second = text.partition("/")
    part, parts = (int(word) if word.isascii() and word.isdigit() else 0 for word in (first, second))
    if not slash or not 1 <= part <= parts:
        raise ConfigError(f"--part {text}", todo="give I/N with I from 1 to N, for instance --part 3/16")
    return part - 1, parts


def parse_bytes(text: str | None) -> int | None:
    """Read a size in powers of 1000, as they are printed: 200GB, 1.5 TB, 500000000; None stays None."""
    if text is None:
        return None
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    size = int(float(match[1]) * units[match[2] or ""]) if match else 0
    if not size:
        raise ConfigError(f"{text!r} is not a size", todo="give a number and a unit, for instance 200GB or 500MB")
    return size


def wanted_sets(texts: Sequence[str]) -> dict[str, float]:
    """Read names with weights, NAME or NAME:WEIGHT, in their order; without one the weight is 1.

    ConfigError for a name that comes twice, and for a weight that is not above 0.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, colon, last = text.rpartition(":")
        try:
            weight = float(last) if colon else 1.0
        except ValueError:  # timm:NAME
            name, weight = text, 1.0
        name = name if colon else text
        if not name or not 0 < weight < float("inf"):
            raise ConfigError(f"{text!r} is no NAME:WEIGHT", todo="give a weight above 0, for instance mae:0.5")
        if name in found:
            raise ConfigError(f"{name} was given twice", todo="give each set once, with its weight: NAME:WEIGHT")
        found[name] = weight
    return found


def parse_rows(given: str | int | None) -> AskedRows | None:
    """Read --k, here and nowhere else; None (not given) stays None."""
    if given is None:
        return None
    text = str(given)
    if text == "all":
        return "all"
    if text == "none":
        return "none"
    if not (text.isascii() and text.isdigit()):
        todo = "give a number of patches from 0, all, or none for no attention target"
        near = nearest(text, ("all", "none")) if text[:1].lower() in ("a", "n") else ""  # "some" is not "none"
        raise ConfigError(f"--k {text} is no number of patches{near}", todo=todo)
    return int(text)


def read_toml(path: str | Path, config: type) -> dict[str, Any]:
    """Read settings of one stage from a TOML file; unknown keys fail and name the nearest one."""
    try:
        values = tomllib.loads(Path(path).read_bytes().decode())
    except (OSError, ValueError) as error:  # ValueError: not TOML, or not UTF-8
        raise ConfigError(f"cannot read the settings: {error}", where=str(path)) from error
    fields = {f.name: f for f in dataclasses.fields(config)}
    result = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise ConfigError(f"unknown setting {key!r}{nearest(name, fields)}", where=str(path))
        if name in result:
            raise ConfigError(f"the setting {name} was given twice, with '-' and with '_'", where=str(path))
        result[name] = _typed(key, value, str(fields[name].type), str(path))
    return result


def _typed(key: str, value: Any, kind: str, where: str) -> Any:
    """Return a TOML value as its field's type, or raise ConfigError: 3 is a float too, "3" is no number."""
    wanted = kind.split(" ")[0].split("[")[0]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted == "float" and number:
        return float(value)
    if (
        wanted == "tuple"
        and isinstance(value, list)
        and len(value) == kind.count("float")
        and not {type(v) for v in value} - {int, float}
    ):
        return tuple(value)
    if kind == "tuple[str, ...]":
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
        raise ConfigError(f"{key} = {value!r} is not a list of strings", where=where)
    if wanted == "str" and key == "k" and type(value) is int:
        return str(value)
    if type(value) is {"int": int, "str": str, "bool": bool, "dict": dict}.get(wanted):
        return value
    names = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false"}
    what = names.get(wanted, f"a list of {kind.count('float')} numbers" if wanted == "tuple" else "a table")
    raise ConfigError(f"{key} = {value!r} is not {what}", where=where)
