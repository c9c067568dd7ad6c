"""UPerNet on the outputs of a plain vision transformer. Source: Xiao et al. 2018, arXiv:1807.10221, section 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

BINS = (1, 2, 3, 6)
"""Cells per side of the pooled maps."""
WIDTH, AUXILIARY_WIDTH = 512, 256
AUXILIARY = 2
"""Which of the maps the auxiliary head reads."""


def conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the size stays."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def resized(picture: Tensor, like: Tensor) -> Tensor:
    """Scale a map to the size of another."""
    return interpolate(picture, size=like.shape[2:], mode="bilinear", align_corners=False)


class Scales(nn.ModuleList):
    """From four maps of one size to a pyramid: 4, 2, 1 and 1/2 times that size. Channels stay."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(channels, channels, 2, stride=2),
                    nn.BatchNorm2d(channels),
                    nn.GELU(),
                    nn.ConvTranspose2d(channels, channels, 2, stride=2),
                ),
                nn.ConvTranspose2d(channels, channels, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )


class UperNetHead(nn.Module):
    """Four maps (B, C, h, w) of an encoder to logits (B, num_classes, 4 h, 4 w)."""

    def __init__(self, channels: int, num_classes: int, width: int = WIDTH) -> None:
        super().__init__()
        self.scales = Scales(channels)
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(channels, width, 1)) for n in BINS)
        self.bottleneck = conv(channels + len(BINS) * width, width, 3)
        self.laterals = nn.ModuleList(conv(channels, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in range(3))
        self.fusion = conv(4 * width, width, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.auxiliary = nn.Sequential(
            conv(channels, AUXILIARY_WIDTH, 3), nn.Dropout2d(0.1), nn.Conv2d(AUXILIARY_WIDTH, num_classes, 1)
        )

    def forward(self, maps: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits; in training also those of the auxiliary head."""
        pyramid = [scale(found) for scale, found in zip(self.scales, maps, strict=True)]
        logits: Tensor = self.classifier(self.dropout(self.fused(pyramid)))
        return (logits, self.auxiliary(pyramid[AUXILIARY])) if self.training else logits

    def fused(self, pyramid: list[Tensor]) -> Tensor:
        """Join a pyramid, the finest map first, into one map of the finest size: (B, width, h, w)."""
        last = pyramid[-1]
        pooled = [resized(pool(last), last) for pool in self.pools]
        levels = [lateral(found) for lateral, found in zip(self.laterals, pyramid, strict=False)]
        levels.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for finer in range(len(levels) - 2, -1, -1):
            levels[finer] = levels[finer] + resized(levels[finer + 1], levels[finer])
        joined = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=False)] + [levels[-1]]
        out: Tensor = self.fusion(torch.cat([resized(level, joined[0]) for level in joined], dim=1))
        return out
