"""What an export gives in the timm that is found first; as a program: python load_export.py EXPORT OUT.safetensors."""

from __future__ import annotations

import sys

import timm
import torch
from safetensors.torch import save_file

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()


@torch.no_grad()
def features(folder: str) -> dict[str, torch.Tensor]:
    """Load an export in the ways of its README, and return what each gives."""

    def load(**args: object) -> torch.nn.Module:
        torch.manual_seed(0)  # of a new head
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **args).eval()

    plain, pooled = load(), load(num_classes=10, global_pool="avg")
    assert plain.num_classes == 0
    return {
        "tokens": plain.forward_features(IMAGES),
        "class token": plain(IMAGES),
        "pooled, without its new norm and head": pooled.forward_features(IMAGES),
        "a new head": pooled(IMAGES),
        "new head's shape": torch.tensor(pooled.head.weight.shape),
        **{f"block {i}": x for i, x in enumerate(load(features_only=True)(IMAGES))},
    }


if __name__ == "__main__":
    tensors = {name: value.contiguous() for name, value in features(sys.argv[1]).items()}
    save_file(tensors, sys.argv[2], metadata={"timm": timm.__version__})
