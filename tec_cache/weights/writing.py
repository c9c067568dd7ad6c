"""A .safetensors file with a heading that does not depend on chance."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor


def weights_bytes(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a .safetensors file; the same for the same weights and metadata.

    safetensors writes several entries of metadata in an order that changes from process to process, so they are put
    into the heading here, sorted. "format": "pt" is what transformers asks for.
    """
    data = save({name: value.contiguous() for name, value in state.items()}, metadata={"format": "pt"})
    length = int.from_bytes(data[:8], "little")
    heading = json.loads(data[8 : 8 + length])
    heading["__metadata__"] = dict(sorted({"format": "pt", **(metadata or {})}.items()))
    text = json.dumps(heading, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
