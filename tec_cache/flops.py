"""Multiply-accumulates (MAC) of base and student, from the models' dimensions; one MAC is two FLOP.

Linear maps, convolutions and attention products are counted, as is usual; norms, activations and softmax are not.
"""

from __future__ import annotations

from typing import Any

from torch import nn

BACKWARD = 2
"""A backward pass costs two forward passes: one product for the inputs' gradient, one for the weights'."""


def base_macs(base: Any) -> int:
    """Return the MAC of one view through a `FrozenBase`: the whole model and the attention rows computed again."""
    patches = base.grid**2
    tokens = patches + base.num_prefix
    macs = _patch_macs(base.model.patch_embed, patches)
    for block in base.model.blocks:
        macs += _linear_macs(block) * tokens + 2 * tokens**2 * _attention_width(block)
    if base.k is not None:
        rows = patches if base.k == "all" else base.k
        macs += (1 + rows) * patches * _attention_width(base.model.blocks[-1])
    return int(macs)


def student_macs(student: Any, visible: int) -> int:
    """Return the MAC of one view through a `Student` that sees so many patches, forward.

    A training step takes 1 + BACKWARD times as many.
    """
    encoder, decoder, tokens = student.encoder, student.decoder, student.num_prefix + visible
    macs = _patch_macs(encoder.patch_embed, visible)
    for block in encoder.blocks:
        macs += _linear_macs(block) * tokens + 2 * tokens**2 * _attention_width(block)
    for adapters in student.encoder_adapters:
        macs += _linear_macs(adapters) * (1 + visible)
    # the input adapter sees one class token a batch: nothing
    for goal, heads in zip(student.goals.values(), student.heads, strict=True):
        patches = goal.spec.num_tokens
        for head in heads.values():
            macs += head.macs(goal.spec, visible)
            for block in decoder.blocks if head.branch else ():
                macs += _linear_macs(block) * (1 + patches) + 2 * (1 + patches) ** 2 * _attention_width(block)
    return int(macs)


def _linear_macs(module: nn.Module) -> int:
    """Return the MAC of one token through all linear maps of a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _patch_macs(embed: Any, patches: int) -> int:
    return int(embed.proj.weight.numel()) * patches


def _attention_width(block: Any) -> int:
    """Return heads * width of a head."""
    return int(block.attn.proj.in_features)
