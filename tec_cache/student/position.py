"""MAE's fixed two-dimensional sine-cosine position embedding."""

from __future__ import annotations

import torch

from tec_cache.errors import ConfigError


def sincos_position(width: int, grid: int, num_prefix: int = 1) -> torch.Tensor:
    """Return the embedding (1, num_prefix + grid * grid, width) float32; that of class token and registers is zero.

    The first half of the channels encodes the column (sines, then cosines), the second half the row;
    frequencies are 10000 ** (-2i / (width / 2)).
    """
    if width % 4:
        raise ConfigError(f"width {width} cannot hold a 2-D sine-cosine embedding", todo="use a multiple of 4")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    axis = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    wave = torch.cat([axis.sin(), axis.cos()], dim=1)
    columns = wave[None].expand(grid, grid, -1)
    rows = wave[:, None].expand(grid, grid, -1)
    patches = torch.cat([columns, rows], dim=2).reshape(grid * grid, width)
    return torch.cat([torch.zeros(num_prefix, width, dtype=torch.float64), patches])[None].float()
