"""Mask R-CNN with a simple feature pyramid on an exported encoder, with torchvision and nothing else.

A small thing to begin from, not ViTDet: all blocks see the whole image, and positions are interpolated once to the
images' size. Photos with boxes are drawn here (bright rectangles and discs on noise); replace `drawn` by your own.

    python examples/detect.py vit-b-tec --steps 20
"""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

Target = dict[str, Tensor]
LEVELS = ("0", "1", "2", "3")


class Pyramid(nn.Module):
    """A plain encoder as a backbone of four strides: a quarter, a half, once and twice that of its patches.

    Everything comes from the last map, scaled up by transposed convolutions and down by pooling; each level ends in a
    1 x 1 and a 3 x 3 convolution to `out_channels`.
    """

    def __init__(self, encoder: nn.Module, out_channels: int = 256) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, out_channels
        width = int(encoder.embed_dim)
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width // 2, 2, 2), nn.GELU(), nn.ConvTranspose2d(width // 2, width, 2, 2)
                ),
                nn.ConvTranspose2d(width, width, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, 2),
            ]
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, out_channels, 1), nn.Conv2d(out_channels, out_channels, 3, padding=1))
            for _ in LEVELS
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the maps of images (B, 3, S, S), finest first."""
        _, (last,) = self.encoder.forward_intermediates(images, indices=1, norm=False, output_fmt="NCHW")
        levels = (smooth(scale(last)) for scale, smooth in zip(self.scales, self.smooth, strict=True))
        return OrderedDict(zip(LEVELS, levels, strict=True))


def detector(export: str, classes: int, size: int, out_channels: int = 256, **options: Any) -> MaskRCNN:
    """Return Mask R-CNN on an export.

    classes: without the background; size: pixels per side of its images; options: of torchvision's MaskRCNN.
    """
    encoder = timm.create_model(f"local-dir:{export}", pretrained=True, img_size=size)
    cfg, stride = encoder.pretrained_cfg, int(encoder.patch_embed.patch_size[0])
    anchors = AnchorGenerator(tuple((stride * step,) for step in (1, 2, 4, 8)), ((0.5, 1.0, 2.0),) * 4)
    return MaskRCNN(
        Pyramid(encoder, out_channels),
        classes + 1,
        min_size=size,
        max_size=size,
        fixed_size=(size, size),
        size_divisible=stride * 2,
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(list(LEVELS), 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(list(LEVELS), 14, 2),
        **options,
    )


def drawn(count: int, size: int, seed: int = 0) -> list[tuple[Tensor, Target]]:
    """Draw photos (3, S, S), 0 to 1, of one or two things each: boxes, masks, classes (1: rectangle, 2: disc)."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pairs = []
    for _ in range(count):
        photo = 0.3 * torch.rand(3, size, size, generator=generator)
        masks, labels = [], []
        for side in range(1 + int(between(0, 2))):  # one in the left half, another in the right one
            radius = between(size / 10, size / 5)
            x, y = between(radius, size / 2 - radius) + side * size / 2, between(radius, size - radius)
            disc = between(0, 1) < 0.5
            apart = (columns - x).abs(), (rows - y).abs()
            mask = torch.hypot(*apart) < radius if disc else (apart[0] < radius) & (apart[1] < radius)
            photo[:, mask] = torch.tensor([0.9, 0.2, 0.2] if disc else [0.2, 0.4, 0.9])[:, None]
            masks.append(mask)
            labels.append(2 if disc else 1)
        boxes = [[*(m.nonzero().amin(0).flip(0)), *(m.nonzero().amax(0).flip(0) + 1)] for m in masks]
        target = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels), "masks": torch.stack(masks)}
        pairs.append((photo, target | {"masks": target["masks"].to(torch.uint8)}))
    return pairs


def train(model: MaskRCNN, pairs: list[tuple[Tensor, Target]], *, steps: int, batch: int, lr: float) -> Iterator[float]:
    """Train, and give the sum of the losses of each step; lr warms up over a tenth of the steps, then falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    warm = max(1, steps // 10)
    factor = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    model.train()
    for step in range(steps):
        chosen = [pairs[(step * batch + number) % len(pairs)] for number in range(batch)]
        photos, targets = zip(*chosen, strict=True)
        loss = sum(model(list(photos), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        factor.step()
        yield float(loss.detach())


def main() -> None:
    """Train on drawn photos and print the losses."""
    parser = argparse.ArgumentParser(description="Train Mask R-CNN on an export of tec-cache.")
    parser.add_argument("export")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    few = {"rpn_post_nms_top_n_train": 200, "box_batch_size_per_image": 64}  # two things in a photo need no thousands
    model = detector(options.export, 2, options.size, **few)
    pairs = drawn(options.photos, options.size)
    for step, loss in enumerate(train(model, pairs, steps=options.steps, batch=options.batch, lr=options.lr)):
        print(f"step {step + 1}: loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
