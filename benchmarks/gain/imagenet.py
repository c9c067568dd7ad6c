"""The paper's comparison on ImageNet as commands. Nobody has run them with this program."""

from __future__ import annotations

BASES = (("mae", 300), ("mae", 800), ("ibot", 300), ("ibot", 800))
"""Rows of the paper's table of ViT-B: base, and epochs of the new model."""


def commands() -> str:
    """Return the commands of the table of ViT-B: a target set per base, a fine-tuning per new model and base."""
    lines = [
        "# Eight GPUs and ImageNet as shards. Not run with this program; the cache takes what `tec-cache plan` says.",
        "T8='torchrun --nproc-per-node 8 --no-python'",
    ]
    for base in dict.fromkeys(name for name, _ in BASES):
        lines += [
            f"$T8 tec-cache extract --input 'train-*.tar' --cache cache --base {base} --views 8",
            f"$T8 tec-cache finetune {base} --recipe {base}-b-800 --train 'train-*.tar' --test 'val-*.tar' "
            f"--out runs/{base}-base",
        ]
    for base, epochs in BASES:
        name = f"{base}-{epochs}"
        lines += [
            f"$T8 tec-cache train --cache cache --target {base} --epochs {epochs} --out runs/{name}",
            f"tec-cache export runs/{name} models/{name}",
            f"$T8 tec-cache finetune models/{name} --train 'train-*.tar' --test 'val-*.tar' --out runs/{name}-tuned",
        ]
    return "\n".join(lines)
