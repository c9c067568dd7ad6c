"""Attention of the heads of one block as colours over a photo."""

from __future__ import annotations

import colorsys

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tec_cache.errors import ConfigError
from tec_cache.types import Targets

Picture = npt.NDArray[np.uint8]

OPACITY = 0.85
"""Opacity of a head's colour where its attention is highest."""
LEAST_PEAK = 4.0
"""The least attention, as a multiple of the mean, at which a colour reaches full strength: a head that looks nowhere
in particular stays faint, instead of being all colour."""
_DIMMED = 0.75
"""Brightness of the grey photo below the colours: saturated hues stand out from it, and it is still recognized."""
_SHARPNESS = 2.0
"""Exponent of the heads' shares in a mixed colour: a pixel takes the hue of those that look at it most."""


def attention_maps(targets: Targets, grid_shape: tuple[int, int] | None = None) -> Tensor:
    """Return where the class token looks: (B, H, rows, columns) float32, each map sums to 1 over the patches.

    targets: what a base says about images, with attention logits (B, H, k+1, L), whose row 0 is the class token's (or
    the mean query's in a model without one); k = 0 is enough. grid_shape: rows and columns of patches; None for
    a square. The softmax is taken over the patches alone, as in the attention target. Raises ConfigError if the targets
    hold no attention.
    """
    if targets.attention is None:
        raise ConfigError("these targets hold no attention", todo="load the base with k=0 or more")
    first = targets.attention[:, :, 0].float()
    rows, columns = grid_shape or (round(first.shape[-1] ** 0.5),) * 2
    return first.softmax(dim=-1).unflatten(-1, (rows, columns))


def head_colours(num_heads: int) -> npt.NDArray[np.float64]:
    """Return a colour for each head, (num_heads, 3) from 0 to 1: hues at equal distances, neighbours far apart."""
    step = next(s for s in (5, 7, 3, 2, 1) if np.gcd(s, num_heads) == 1)
    hues = [(i * step % num_heads) / num_heads for i in range(num_heads)]
    return np.array([colorsys.hsv_to_rgb(hue, 1.0, 1.0) for hue in hues]).reshape(num_heads, 3)


def attention_overlay(photo: Picture, maps: Tensor | npt.NDArray[np.floating]) -> Picture:
    """Lay all heads over a photo, each in its colour of `head_colours`: (S, S', 3) uint8.

    photo: (S, S', 3) uint8 RGB. maps: (H, rows, columns), as `attention_maps` gives them for one image. Each head is
    scaled to its own maximum, or to LEAST_PEAK times its mean if that is more; the photo below is grey.
    """
    heights = _scaled(maps, photo.shape[:2])
    return _painted(photo, heights, head_colours(len(heights)))


def head_overlay(photo: Picture, maps: Tensor | npt.NDArray[np.floating], head: int) -> Picture:
    """Lay one head over a photo, in the colour that it has among all of them; arguments as in `attention_overlay`."""
    heights = _scaled(maps, photo.shape[:2])
    return _painted(photo, heights[head : head + 1], head_colours(len(heights))[head : head + 1])


def _scaled(maps: Tensor | npt.NDArray[np.floating], size: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return the maps at a photo's size, (H, S, S'), each from 0 to 1."""
    values = torch.as_tensor(maps).detach().double().cpu()
    large = interpolate(values[None], size=(size[0], size[1]), mode="bilinear", align_corners=False)[0]
    most = torch.maximum(large.amax(dim=(1, 2), keepdim=True), LEAST_PEAK * values.mean(dim=(1, 2))[:, None, None])
    most = most.clamp(min=1e-30)
    return (large.clamp(min=0) / most).numpy()


def _painted(
    photo: Picture, heights: npt.NDArray[np.float64], colours: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    grey = photo.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    below = np.repeat(_DIMMED * grey[..., None], 3, axis=2)
    shares = heights**_SHARPNESS
    mixed = np.einsum("hij,hc->ijc", shares, colours) / np.maximum(shares.sum(axis=0), 1e-30)[..., None]
    opacity = (OPACITY * heights.max(axis=0))[..., None]
    return np.rint((1 - opacity) * below + opacity * 255 * mixed).clip(0, 255).astype(np.uint8)
