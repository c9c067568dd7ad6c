"""Ways out: an export as other libraries have such a model. One file a format; each is the inverse of a way in.

`weights/layouts` turns the names of others into timm's, a format turns timm's into theirs. A format never drops a
weight in silence: what it has no place for is either named with the reason, or refused.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tec_cache.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tec_cache.formats.format import Format

FORMATS: dict[str, str] = {
    "transformers": "tec_cache.formats.transformers_vit",
    "detectron2": "tec_cache.formats.detectron2_vitdet",
    "mmpretrain": "tec_cache.formats.mmpretrain_vit",
    "timm": "tec_cache.formats.timm_folder",
}
"""Name of a format -> the module with its FORMAT, imported when it is asked for: the command's help needs no torch."""


def format_named(name: str) -> Format:
    """Return a format by its name. Raises ConfigError for one that is not known."""
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}{nearest(name, FORMATS)}", todo=f"one of {', '.join(FORMATS)}")
    found: Format = import_module(FORMATS[name]).FORMAT
    return found
