"""Settings as the options that would give them on the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

ARGUMENTS = ("input", "model")
"""Settings that a command takes without an option."""


def option_words(kind: type, config: Mapping[str, Any]) -> list[str]:
    """Return the options of a config's settings that are not the defaults, in the order of its fields.

    kind: the config's class. config: its fields by name; what it lacks is left out.
    """
    words: list[str] = []
    for item in dataclasses.fields(kind):
        value = config.get(item.name)
        if item.name in ARGUMENTS or value is None or value is False or value == item.default:
            continue
        if str(item.type) == "tuple[str, ...]":
            words += [word for name in value for word in ("--" + item.name, name)]
            continue
        flag = "--" + item.name.replace("_", "-")
        if isinstance(value, Mapping):  # student_args, base_args
            for name, given in value.items():
                words += [flag.removesuffix("s"), f"{name}={_argument(given)}"]
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag] if value is True else [flag, str(value)]
    return words


def _argument(value: Any) -> str:
    """Write a value as `--student-arg` reads it: JSON, or a string that is none."""
    try:
        json.loads(value)
    except (TypeError, ValueError):
        return value if isinstance(value, str) else json.dumps(value)
    return json.dumps(value)
