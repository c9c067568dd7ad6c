"""Key map from the authors' released program to this project's student.

The names on the left are those of its checkpoints; "adaptor" there is an adapter here. Only names are mapped,
so it holds for any depth, width, number of heads, k and tau.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from tec_cache.errors import WeightsError

# (released prefix, ours), first match wins
_PREFIXES = (
    ("cls_token_mlp.", "input_adapter."),
    ("encoder_adaptor.adap_before.", "encoder_adapters.0.norm_before."),
    ("encoder_adaptor.adap_after.", "encoder_adapters.0.norm_after."),
    ("encoder_adaptor.fuse_fcs.", "encoder_adapters.0.fuse."),
    ("encoder_adaptor.adap_mlps.", "encoder_adapters.0.mlps."),
    ("forward_fea_decoder.mask_token", "heads.0.feature.mask_token"),
    ("forward_fea_decoder.decoder_embed.", "heads.0.feature.embed."),
    ("forward_fea_decoder.decoder_norm.", "heads.0.feature.norm."),
    ("forward_fea_decoder.decoder_pred.", "heads.0.feature.head."),
    ("forward_att_decoder.mask_token", "heads.0.attention.mask_token"),
    ("forward_att_decoder.decoder_embed.", "heads.0.attention.embed."),
    ("forward_att_decoder.decoder_norm.", "heads.0.attention.norm."),
    ("forward_att_decoder.decoder_qk.", "heads.0.attention.head."),
    ("decoder_blocks.", "decoder.blocks."),
    ("decoder_pos_embed", "decoder.position"),
    ("blocks.", "encoder.blocks."),
    ("patch_embed.", "encoder.patch_embed."),
    ("norm.", "encoder.norm."),
    ("cls_token", "encoder.cls_token"),
    ("pos_embed", "encoder.pos_embed"),
)


def student_name(released: str) -> str:
    """Return this project's name of a parameter of the released program. Raises WeightsError if unknown."""
    for theirs, ours in _PREFIXES:
        if released.startswith(theirs):
            return re.sub(f"^{re.escape(theirs)}", ours, released)
    raise WeightsError(f"the released program's student has no parameter {released!r}")


def student_state(released: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a released pretraining checkpoint's `model` for `Student.load_state_dict(strict=True)`."""
    return {student_name(name): value for name, value in released.items()}
