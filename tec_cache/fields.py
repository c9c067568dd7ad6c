"""How settings are declared and checked: a field with its help, and what its value may be. Without torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from enum import Enum
from typing import Any

from tec_cache.errors import ConfigError, nearest
from tec_cache.paths import expanded

DEVICES = ("auto", "cpu", "cuda")
"""Where a model may run; cuda:N too."""


class Names(Enum):
    """What the value of a setting names, so that a shell can complete it."""

    FILE = "a file"
    FOLDER = "a folder"
    SETTINGS = "a TOML file of settings"
    PHOTOS = "tars, parquet files, or a folder of photos"
    LABELLED = "photos with labels, or a cache"
    CACHE = "a cache or pack"
    RUN = "the folder of a run"
    EXPORT = "an exported model"
    START = "an export or a run"
    OURS = "anything that this program makes"
    WEIGHTS = "a weight file, or a folder that has one"
    BASE = "a known base, a weight file or a folder"
    BASE_OR_TARGET = "a base, or a target set whose base is meant"
    TARGET = "a target set of the cache"


def setting(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    names: Names | None = None,
    required: bool = False,
) -> Any:
    """Declare a field with its documentation string.

    choices: the values that it may have beside None, see `check_choices`. words: some values among others, for shells
    to complete. names: what a value names. required: whether the help says that it must be given.
    """
    declared = {"help": text, "choices": choices, "words": words, "names": names, "required": required}
    return field(default=default, metadata=declared)


def table(text: str) -> Any:
    """Declare a field of names with values, empty by default."""
    return field(default_factory=dict, metadata=dict(setting(None, text).metadata))


def pixel_mean(whose: str) -> Any:
    """Declare the mean of the pixels that a model was trained on: (3,), or None for what its release says."""
    return setting(
        None, f"Mean of the pixels that the {whose} was trained on, per channel, 0 to 1.  [default: its release's]"
    )


def pixel_std() -> Any:
    """Declare the deviation that belongs to `pixel_mean`."""
    return setting(None, "Standard deviation of those pixels, per channel.  [default: its release's]")


def untold(whose: str, such_as: str) -> Any:
    """Declare what is said of a model because its weights cannot: a table of names and values."""
    return table(f"Set what the {whose}'s weights do not tell, NAME=VALUE ({such_as}, ...); may be repeated.")


def is_place(declared: dataclasses.Field[Any]) -> bool:
    """Say whether the value of a field may be a path or URL."""
    return declared.metadata.get("names") not in (None, Names.TARGET)


def varied(component: type, name: str, default: Any, says: str = "") -> Any:
    """Declare a component's field anew with another default, its help as it is there.

    says: what the help says of the default, where that is not its value.
    """
    (declared,) = (f for f in dataclasses.fields(component) if f.name == name)
    metadata = dict(declared.metadata)
    if says:
        metadata["help"] = f"{metadata['help'].partition('  [default: ')[0]}  [default: {says}]"
    return field(default=default, metadata=metadata)


def expand_paths(config: Any) -> None:
    """Replace a leading ~ in every place that a frozen config names."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if is_place(item) and isinstance(value, str):
            object.__setattr__(config, item.name, expanded(value))
        elif is_place(item) and isinstance(value, tuple):
            object.__setattr__(config, item.name, tuple(map(expanded, value)))


def changed(config: Any) -> list[str]:
    """Name the fields that differ from their defaults: what was given, as far as a config can tell."""
    missing = dataclasses.MISSING
    defaults = {
        f.name: f.default if f.default_factory is missing else f.default_factory() for f in dataclasses.fields(config)
    }
    return [name for name, default in defaults.items() if getattr(config, name) != default]


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices; None is always one."""
    if value is not None and value not in choices:
        option = "--" + name.replace("_", "-")
        raise ConfigError(
            f"{option} {value}{nearest(str(value), choices)}", todo=f"choose one of: {', '.join(choices)}"
        )


def check_choices(config: Any) -> None:
    """Refuse a value of any field that is none of the choices with which the field was declared."""
    for item in dataclasses.fields(config):
        if item.metadata.get("choices"):
            check_choice(item.name, getattr(config, item.name), item.metadata["choices"])


def check_positive(config: Any, *names: str) -> None:
    """Refuse numbers below 1; None stays."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}", todo="give a number of at least 1")


def check_share(config: Any, *names: str) -> None:
    """Refuse numbers outside 0 to 1; None stays."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}", todo="give a number from 0 to 1")


def check_interval(config: Any, *names: str, most: float = math.inf) -> None:
    """Refuse pairs that are no interval of positive numbers up to `most`; None stays."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (0 < value[0] <= value[1] <= most and value[1] < math.inf):
            limit = f", {most:g} at most" if most < math.inf else ""
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {value[0]:g} {value[1]:g}", todo=f"give two numbers above 0 in order{limit}")


def check_range(config: Any, lowest: float, *names: str, open_end: bool = False, below: float = math.inf) -> None:
    """Refuse numbers outside [lowest, below), or (lowest, below) with an open end; infinities and NaN too."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (lowest < value < below or (value == lowest and not open_end)):
            limits = f"above {lowest}" if open_end else f"of at least {lowest}"
            limits += f" and below {below}" if below < math.inf else ""
            raise ConfigError(f"--{name.replace('_', '-')} {value}", todo=f"give a number {limits}")
