"""The base of a target set, by what the set's manifest remembers of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tec_cache.base.source import Given
from tec_cache.cache.reader import Cache
from tec_cache.cache.target_set import TargetSet
from tec_cache.data.photos import plain_text
from tec_cache.errors import ConfigError
from tec_cache.paths import exact_name
from tec_cache.recipes import BASES


def remember(base: str, weights: str | None, given: Given) -> dict[str, Any]:
    """Return the notes by which `base_again` finds a base: its name as it was given, its weight file, what was said."""
    file = {} if weights is None else {"weights": plain_text(os.path.abspath(weights))}
    return {"base": plain_text(base), "given": given.to_json()} | file


def base_again(notes: Mapping[str, Any], weights: str | None, *, target: str) -> tuple[str, str | None]:
    """Return the name and the weight file that `load_base` takes for the base of a target set.

    notes: of the set's manifest. weights: where its file or folder lies now, if not where it was. target: the set's
    name. Raises ConfigError where a file or folder is not there any more.
    """
    name, known = exact_name(str(notes["base"])), notes.get("weights")
    place = None if known is None else exact_name(str(known))
    if not (name in BASES or name.startswith("timm:")):  # it is a place itself, and may lie elsewhere by now
        if weights is not None and not Path(name).is_dir():
            return weights, None
        if not Path(name).exists():
            raise _gone("the base", name, target, "give its file or folder: --base-weights PLACE")
    if weights is None and place is not None and not Path(place).exists():
        raise _gone("the base's weight file", place, target, "give it with --base-weights FILE")
    return name, weights or place


def still_there(notes: Mapping[str, Any], base: str) -> bool:
    """Say whether a set was made by this base from a weight file that is still where it was."""
    known = notes.get("weights")
    return known is not None and exact_name(str(notes["base"])) == base and Path(exact_name(str(known))).exists()


def given_before(notes: Mapping[str, Any]) -> Given:
    """Return what was said of the base when the set was made."""
    return Given.from_json(notes.get("given"))


def set_meant(name: str, cache: Cache) -> TargetSet | None:
    """Return the target set whose base is meant where a base is asked for by `name`; None where that is a base's own.

    A name of a base or of timm's, a file or a folder comes first, unless it is the one that made the set.
    """
    if name not in cache.target_names:
        return None
    target = cache[name]
    made_by = exact_name(str(target.manifest["notes"]["base"]))
    own = name in BASES or name.startswith("timm:") or Path(name).exists()
    return target if not own or same_base(name, made_by) else None


def same_base(one: str, other: str) -> bool:
    """Say whether two words name one base: the same word, or the same place."""
    return os.path.abspath(one) == os.path.abspath(other)


def _gone(what: str, place: str, target: str, todo: str) -> ConfigError:
    return ConfigError(f"{what} is not where it was when the targets {target!r} were made", where=place, todo=todo)
