"""A folder of timm's own hub: the model alone, without adapters and without what this program keeps for itself."""

from __future__ import annotations

import json

from safetensors.torch import save

from tec_cache.formats.format import Converted, Format, adapters_left_out
from tec_cache.formats.model import Model

_USAGE = """import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True)"""


def convert(model: Model) -> Converted:
    """Write config.json as timm's push to the hub has it, and the weights unchanged."""
    config = {name: value for name, value in model.config.items() if name != "tec_cache"}
    return Converted(
        files={
            "model.safetensors": save({n: v.contiguous() for n, v in model.state.items()}, metadata={"format": "pt"}),
            "config.json": json.dumps(config, indent=2).encode() + b"\n",
        },
        left_out=adapters_left_out(model),
        usage=_USAGE,
    )


FORMAT = Format("timm", "a folder of timm's hub", convert)
