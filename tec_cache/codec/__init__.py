"""How targets become small arrays and come back: one file a codec, and its line here. `codec.py` has their contract."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any, NamedTuple

from tec_cache.codec.codec import ZSTD_LEVEL, ArraySpec, Codec, most_parameter_bytes
from tec_cache.errors import CacheError

__all__ = ["CODECS", "ZSTD_LEVEL", "ArraySpec", "Codec", "Making", "get_codec", "most_parameter_bytes"]


class Making(NamedTuple):
    """How a codec is made: two functions as `module:name`, imported when they are asked for. Settings need no torch."""

    read: str
    """Takes the bytes of its parameters, None where it has none. Raises ValueError for those of no such codec."""
    fit: str | None
    """Takes normalized targets, their spec, and the asked errors as `mse` and `kl` (None without an attention target);
    its result's `to_bytes` is what `read` takes. None for a codec that needs no fit."""
    qualities: Mapping[str, tuple[float | None, float | None]]
    """Names by which `--quality` asks for it -> mse and kl: relative mean squared error of the features, KL divergence
    of the attention rows in nats at tau 1. None, None for a codec that needs no fit."""


CODECS: dict[str, Making] = {
    "exact": Making("tec_cache.codec.fp16:read", None, {"exact": (None, None)}),
    "transform": Making(
        "tec_cache.codec.transform:TransformCodec.from_bytes",
        "tec_cache.codec.fit:fit_transform",
        {"high": (0.02, 0.01), "default": (0.04, 0.03), "small": (0.10, 0.08)},
    ),
}
"""Name, as the identity of a target set has it -> how the codec is made."""


def get_codec(identity: Mapping[str, Any], parameters: bytes | None) -> Codec:
    """Make a codec from what the identity of a target set says of it and from its fitted parameters.

    Raises CacheError for parameters that are none.
    """
    making = CODECS.get(identity["name"])
    if making is None or (making.fit is not None and parameters is None):
        raise CacheError(f"unknown codec {identity['name']!r}", todo="use the tec-cache release that made the cache")
    try:
        codec: Codec = resolve_name(making.read)(parameters)
    except ValueError as error:
        raise CacheError(f"the codec's parameters are damaged: {error}", todo="restore them from a copy") from error
    return codec
