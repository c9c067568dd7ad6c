"""How targets become small arrays and come back.

A codec is a frozen object with a name, known to `get_codec`. Its contract:

- `arrays(spec)` names the arrays it stores per view, with the shape and dtype of one row.
- `encode(targets, spec)` takes *normalized* targets of a batch (any device) and gives those arrays, batch first.
  A value that it cannot hold is an error, never a silent clip.
- `decode(arrays, spec)` takes the same arrays as tensors on any device and gives float32 `Targets`. It needs
  nothing but what `to_json` wrote down.
- Attention logits are stored without the mean of each row, which the softmax removes anyway: they come back
  up to a constant per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tec_cache.errors import ConfigError, nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from tec_cache.types import Targets, TargetSpec

CODECS = ("fp16", "int8")


class ArraySpec(NamedTuple):
    """One stored array: the shape of a row (without the batch) and its numpy dtype."""

    shape: tuple[int, ...]
    dtype: str


class Codec(Protocol):
    """See the module's docstring."""

    name: str

    def arrays(self, spec: TargetSpec) -> dict[str, ArraySpec]:
        """Name the stored arrays."""

    def encode(self, targets: Targets, spec: TargetSpec) -> dict[str, npt.NDArray[np.generic]]:
        """Turn normalized targets into arrays."""

    def decode(self, arrays: dict[str, torch.Tensor], spec: TargetSpec) -> Targets:
        """Turn arrays into float32 targets."""

    def to_json(self) -> dict[str, Any]:
        """Return what `get_codec` needs to make the codec again."""


def get_codec(config: str | dict[str, Any]) -> Codec:
    """Make a codec from its name or from what `to_json` returned."""
    from tec_cache.codec.fp16 import Float16Codec
    from tec_cache.codec.int8 import Int8Codec

    name = config if isinstance(config, str) else config["name"]
    kinds: dict[str, type[Codec]] = {"fp16": Float16Codec, "int8": Int8Codec}
    if name not in kinds:
        raise ConfigError(f"unknown codec {name!r}{nearest(name, CODECS)}", todo=f"one of: {', '.join(CODECS)}")
    return kinds[name]()
