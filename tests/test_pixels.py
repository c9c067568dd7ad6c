"""One function makes of pixels what models take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tec_cache.pixels import normalized
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD

ROOT = Path(__file__).parent.parent
ANOTHER = re.compile(
    r"(/|div_?\()\s*(255 \* )?(\w+\.)*_?std\b|\bNormalize\(|\bnormalize\(.*\bmean\b|/ 255\b|div_?\(255\)"
)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_normalized_as_torchvision_does_it(layout: torch.memory_format) -> None:
    from torchvision.transforms.functional import normalize

    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).to(memory_format=layout)
    images = values.float()
    found = normalized(images, IMAGENET_MEAN, IMAGENET_STD)
    assert found is images
    assert found.is_contiguous(memory_format=layout)
    assert torch.equal(found, normalize(values.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD)))


def test_no_other_place_normalizes_pixels() -> None:
    places = sorted([*ROOT.glob("tec_cache/**/*.py"), *ROOT.glob("pipelines/**/*.py")])
    code = {str(path.relative_to(ROOT)): re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL) for path in places}
    found = {name: [line for line in text.splitlines() if ANOTHER.search(line)] for name, text in code.items()}
    assert {name for name, lines in found.items() if lines} <= {
        "tec_cache/pixels.py",
        "tec_cache/formats/transformers_vit.py",  # a setting of another library's
        "tec_cache/base/transformers_config.py",
    }, found
    assert found["tec_cache/pixels.py"]
    for line in ("(images / 255 - mean) / std", "x.sub_(mean).div_(self.std)", "v2.Normalize(mean, std)"):
        assert ANOTHER.search(line)
