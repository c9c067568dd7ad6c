"""The demo's picture: what the models look at, and how their losses fell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tec_cache.base.load import load_base
from tec_cache.data.images import decode_photo
from tec_cache.data.source import open_source
from tec_cache.data.views import ViewPlan
from tec_cache.pixels import normalized

IMAGES = 6


def draw(path: Path, shards: str, base: Path, new: Path, grid: int, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Write a PNG: inputs, the class token's attention in base and new model (mean over heads), losses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = {name: load_base(str(folder), grid=grid, k=0) for name, folder in (("base", base), ("new model", new))}
    inputs = test_images(shards, next(iter(models.values())).input_size)
    figure = plt.figure(figsize=(10, 7), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    top, bottom = panels
    axes = top.subplots(1 + len(models), len(inputs))
    for column, pixels in enumerate(inputs):
        axes[0, column].imshow(pixels)
        for row, (name, model) in enumerate(models.items(), start=1):
            axes[row, column].imshow(class_attention(model, pixels), cmap="viridis")
            axes[row, 0].set_ylabel(f"attention,\n{name}")
    axes[0, 0].set_ylabel("test image")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    plots = bottom.subplots(1, len(curves))
    for axis, (name, lines) in zip(plots, curves.items(), strict=True):
        for loss in ("feature", "attention"):
            if loss in lines[0]:
                axis.plot([line["step"] for line in lines], [line[loss] for line in lines], label=f"{loss} loss")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def test_images(shards: str, size: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Return the first few images of the shards, centre-cropped."""
    plan = ViewPlan(crop="center", size=size)
    images = []
    for photo, _ in zip(open_source(shards).shards[0].photos(), range(IMAGES), strict=False):
        image = decode_photo(photo.data).image
        images.append(plan.cut(image, plan.view("", "", 0, image.width, image.height)))
    return images


def class_attention(model: Any, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return softmax of the class token's logits over the patches, mean over heads: (grid, grid) float32."""
    image = normalized(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float(), model.mean, model.std)
    attention = model(image[None]).attention[0, :, 0].softmax(-1).mean(0)
    grid: np.ndarray[Any, np.dtype[np.float32]] = attention.reshape(model.grid, model.grid).numpy()
    return grid
