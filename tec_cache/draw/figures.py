"""The plots, as matplotlib's Figure objects: whoever asked saves them where and how they like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tec_cache.draw.attention import Picture, attention_overlay, head_overlay
from tec_cache.errors import TecCacheError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 81
"""Bins of a histogram from -1 to 1; zero is in the middle of a bin."""
LINES = ("#d1495b", "#2e86ab", "#3c9d5d", "#c98a00", "#8f5fc4", "#00939c", "#c05aa0", "#7a7a2e")
"""Colours of lines that can be told apart, on a white page and on a dark one."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
"""Dash patterns of the lines, in the order of LINES, so that they can be told apart without colour too."""


def require_matplotlib(what: str) -> None:
    """Raise TecCacheError, with what to install, where matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise TecCacheError(
            "plots are drawn by matplotlib, which is not installed",
            where=what,
            todo="pip install '.[report]' in the folder of tec-cache, or pip install 'matplotlib>=3.8'",
        ) from error


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches. Raises TecCacheError without matplotlib."""
    require_matplotlib("tec_cache.draw")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def attention_figure(photo: Picture, maps: Mapping[str, Tensor | npt.NDArray[np.floating]]) -> Figure:
    """Draw the heads of one or several models over a photo: a row for each, all heads together and one by one.

    photo: (S, S', 3) uint8 RGB. maps: name -> (H, rows, columns), as `attention_maps` gives them for one image.
    Raises TecCacheError without matplotlib.
    """
    most = max(len(of) for of in maps.values())
    figure = new_figure(1.3 * (2 + most), 1.45 * len(maps))
    axes: Any = figure.subplots(len(maps), 2 + most, squeeze=False)
    for row, (name, of) in zip(axes, maps.items(), strict=True):
        panels = [photo, attention_overlay(photo, of), *(head_overlay(photo, of, head) for head in range(len(of)))]
        titles = ["photo", "all heads", *(f"head {head}" for head in range(len(of)))]
        for axis in row:
            axis.set_axis_off()
        for axis, panel, title in zip(row, panels, titles, strict=False):
            axis.imshow(panel)
            axis.set_title(title, fontsize=7)
        row[0].text(-0.08, 0.5, name, rotation=90, ha="right", va="center", transform=row[0].transAxes,
                    fontsize=8, parse_math=False)  # fmt: skip
    return figure


def similarity_figure(similarities: Mapping[str, npt.NDArray[np.floating]], width: float = 4.6) -> Figure:
    """Draw histograms of token similarity, one line each: share of the pairs by their cosine.

    similarities: name -> (N,), as `token_similarity` gives them. width: inches. Raises TecCacheError without
    matplotlib.
    """
    figure = new_figure(width, 0.62 * width)
    axis = figure.add_subplot()
    for number, (name, values) in enumerate(similarities.items()):
        shares, edges = similarity_shares(values)
        middles = (edges[:-1] + edges[1:]) / 2
        colour, dash = LINES[number % len(LINES)], DASHES[number % len(DASHES)]
        (line,) = axis.plot(middles, shares, color=colour, linestyle=dash, linewidth=1.4)
        axis.fill_between(middles, shares, color=colour, alpha=0.12, linewidth=0)
        line.set_label(name)
    axis.set_xlim(-1, 1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("cosine of two tokens")
    axis.set_ylabel("share of pairs")
    legend = axis.legend(frameon=False, fontsize=8)
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    return figure


def similarity_shares(
    values: npt.NDArray[np.floating],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the share of the pairs in each of BINS intervals from -1 to 1, which sum to 1, and their edges."""
    counts, edges = np.histogram(values, bins=BINS, range=(-1.0, 1.0))
    return counts / max(1, len(values)), edges
