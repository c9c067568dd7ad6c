"""The paper's figures for any models and photos: attention (2), token similarity (6), shares of the adapters (8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipelines.reporting.charts import bars_plot, similarity_plot
from pipelines.reporting.html import NOTHING, Html, grid, heading, joined, paragraph, picture, table
from pipelines.reporting.images import jpeg
from pipelines.reporting.models import Looked
from pipelines.reporting.shown import Shown, images_of
from tec_cache.draw import attention_maps, attention_overlay, head_overlay, token_similarity
from tec_cache.targets import normalize_features
from tec_cache.types import Normalization, Targets

SIDE = 168
"""Pixels of one head's picture."""
KINDS: dict[Normalization, str] = {
    "none": "raw",
    "feature": "normalized over channels",
    "patch": "normalized over patches",
}


def looks_section(models: Sequence[Looked], pictures: Sequence[Shown], where: str) -> Html:
    """Draw all three figures of some models over the same pictures. where: the pictures are from."""
    seen = [(of, of.model(images_of(pictures, of.model))) for of in models]
    parts = [heading(2, "What the models see", "models"),
             paragraph(f"{len(pictures)} pictures of {where}: ", ", ".join(p.key for p in pictures), ".", kind="note"),
             attention_part(seen, pictures), similarity_part(seen), shares_part(models, pictures)]  # fmt: skip
    return joined(parts)


def attention_part(seen: Sequence[tuple[Looked, Targets]], pictures: Sequence[Shown]) -> Html:
    """Lay each head's attention over each picture, the models below each other."""
    explained = (
        "Where the class token looks in the last block, over the patches. Each head has its own colour, strongest "
        "where it looks most; heads of different models that share a colour have nothing else in common."
    )
    parts = [heading(3, "Attention of the last block", "attention"), paragraph(explained, kind="note")]
    for number, shown in enumerate(pictures):
        parts.append(heading(4, shown.key))
        for of, targets in seen:
            maps = attention_maps(targets, (of.model.grid, of.model.grid)).cpu()[number]
            parts.append(grid(head_tiles(of.title, shown, maps), "tiles"))
    return joined(parts)


def head_tiles(title: str, shown: Shown, maps: torch.Tensor) -> list[Html]:
    """Return a picture, all heads of a model over it, and each of them; maps: (H, rows, columns)."""
    photo, key = shown.pixels(SIDE), shown.key
    together = picture(
        jpeg(attention_overlay(photo, maps)), f"attention of all heads of {title} over {key}", "all heads"
    )
    tiles = [picture(jpeg(photo), f"picture {key}", title), together]
    for head in range(len(maps)):
        alt = f"attention of head {head} of {title} over {key}"
        tiles.append(picture(jpeg(head_overlay(photo, maps, head)), alt, f"head {head}"))
    return tiles


def similarity_part(seen: Sequence[tuple[Looked, Targets]]) -> Html:
    """Draw how alike the tokens of a view are in each model's features, by their normalization."""
    figures, rows = [], []
    for of, targets in seen:
        found = {name: token_similarity(normalize_features(targets.features, how)) for how, name in KINDS.items()}
        said = ", ".join(f"{name} {values.mean():.3f}" for name, values in found.items())
        figures.append(picture(similarity_plot(found), f"token similarity of {of.title}; means: {said}", of.title))
        rows.append([of.title, *(f"{values.mean():.3f}" for values in found.values())])
    explained = (
        "Cosine between every two patch tokens of a picture, in the features that a model gives as a base: the mean of "
        "the last blocks. The more alike all tokens are, the less there is to predict; normalizing over the patches is "
        "what the method does to its target."
    )
    return joined([heading(3, "How alike the tokens are", "similarity"), paragraph(explained, kind="note"),
                   grid(figures, "plots"),
                   table(["model", *KINDS.values()], rows, caption="Mean cosine of two tokens")])  # fmt: skip


def shares_part(models: Sequence[Looked], pictures: Sequence[Shown]) -> Html:
    """Draw each encoder adapter's mean share of Z_e; nothing where no model has adapters."""
    figures = []
    with torch.no_grad():
        for of in models:
            for name, shares in of.shares(images_of(pictures, of.model)).items():
                bars = {f"blocks {3 * i + 1}-{3 * i + 3}": 100 * share for i, share in enumerate(shares)}
                said = ", ".join(f"{part} {share:.1f} %" for part, share in bars.items())
                title = f"{of.title}, target set {name}" if name else of.title
                figures.append(picture(bars_plot(bars, "% of Z_e"), f"shares of Z_e of {title}: {said}", title))
    if not figures:
        return NOTHING
    explained = (
        "What each encoder adapter, which reads three blocks, adds to Z_e: the mean length of its part over the sum of "
        "these means. All patches are seen, as in use."
    )
    return joined([heading(3, "Shares of the encoder adapters", "adapters"), paragraph(explained, kind="note"),
                   grid(figures, "plots")])  # fmt: skip
