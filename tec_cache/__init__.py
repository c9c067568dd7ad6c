"""tec-cache: train a better ViT from a self-supervised one, and pay for the base model once.

The public face; everything is imported when first used, so that `import tec_cache` stays light.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tec_cache.base.load import load_base as load_base
    from tec_cache.cache.opening import open_cache as open_cache
    from tec_cache.config import ExtractConfig as ExtractConfig
    from tec_cache.config import ProbeConfig as ProbeConfig
    from tec_cache.config import TrainConfig as TrainConfig
    from tec_cache.errors import TecCacheError as TecCacheError
    from tec_cache.loader import Loader as Loader
    from tec_cache.student.model import create_student as create_student
    from tec_cache.types import Targets as Targets
    from tec_cache.types import TargetSpec as TargetSpec

try:
    __version__ = metadata.version("tec-cache")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+uninstalled"

_PLACES = {
    "load_base": "tec_cache.base.load",
    "open_cache": "tec_cache.cache.opening",
    "create_student": "tec_cache.student.model",
    "Loader": "tec_cache.loader",
    "Targets": "tec_cache.types",
    "TargetSpec": "tec_cache.types",
    "TecCacheError": "tec_cache.errors",
    "ExtractConfig": "tec_cache.config",
    "TrainConfig": "tec_cache.config",
    "ProbeConfig": "tec_cache.config",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'tec_cache' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
