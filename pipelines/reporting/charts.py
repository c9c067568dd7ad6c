"""The report's plots: lines of several runs, bars, and tables of confusions as colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.reporting.images import plotting, svg
from tec_cache.draw.figures import DASHES, LINES, new_figure, similarity_figure

MOST_POINTS = 400
"""Of a line: beyond that, means of equal parts are drawn."""
WIDTH, HEIGHT = 4.6, 2.7
"""Inches of a plot: on a phone its text is then as large as the page's."""


@dataclass(frozen=True)
class Line:
    """One line of a plot. letter: the run's, written at its end; number: of its colour and dashes."""

    letter: str
    number: int
    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]


def colour(number: int) -> str:
    """Return the colour of a run's lines."""
    return LINES[number % len(LINES)]


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return at most MOST_POINTS points, each the mean of a part of a longer line."""
    pairs = np.array([x, y], np.float64)
    if pairs.shape[1] <= MOST_POINTS:
        return pairs[0], pairs[1]
    parts = np.array([part.mean(axis=1) for part in np.array_split(pairs, MOST_POINTS, axis=1)])
    return parts[:, 0], parts[:, 1]


def lines_plot(lines: Sequence[Line], *, percent: bool = False, zero: bool = False, x: str = "epochs") -> str:
    """Draw the lines of some runs over their epochs. percent: of 1; zero: the axis begins there."""
    with plotting():
        figure = new_figure(WIDTH, HEIGHT)
        axis: Any = figure.add_subplot()
        for line in lines:
            marker = "o" if len(line.x) <= 12 else None
            axis.plot(line.x, line.y, color=colour(line.number), linestyle=DASHES[line.number % len(DASHES)],
                      linewidth=1.5, marker=marker, markersize=3)  # fmt: skip
            axis.annotate(line.letter, (line.x[-1], line.y[-1]), xytext=(4, 0), textcoords="offset points",
                          va="center", color=colour(line.number), fontweight="bold", parse_math=False)  # fmt: skip
        axis.set_xlabel(x)
        if percent:
            axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        if zero:
            axis.set_ylim(bottom=0)
        return svg(figure)


def bars_plot(parts: Mapping[str, float], unit: str) -> str:
    """Draw one horizontal bar for each part. The names are the program's own."""
    with plotting():
        figure = new_figure(WIDTH, 0.5 + 0.36 * len(parts))
        axis: Any = figure.add_subplot()
        names, values = list(parts), list(parts.values())
        shown = axis.barh(range(len(names)), values, color=[colour(1 + i) for i in range(len(names))], height=0.7)
        axis.bar_label(shown, labels=[f"{value:.3g}" for value in values], padding=3)
        axis.set_yticks(range(len(names)), names, parse_math=False)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.14)
        axis.set_xlabel(unit)
        return svg(figure)


def similarity_plot(similarities: Mapping[str, npt.NDArray[np.floating]]) -> str:
    """Draw histograms of token similarity."""
    with plotting():
        return svg(similarity_figure(similarities, WIDTH))


def confusion_plot(counts: npt.NDArray[np.int64]) -> str:
    """Draw counts (classes, classes), a row for each true class, as shares of the row; classes by their numbers."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with plotting():
        figure = new_figure(WIDTH, WIDTH)
        axis: Any = figure.add_subplot()
        axis.imshow(shares, cmap="viridis", vmin=0, vmax=1)
        axis.grid(visible=False)
        axis.set_xlabel("predicted class")
        axis.set_ylabel("true class")
        few = len(counts) <= 20
        if few:
            axis.set_xticks(range(len(counts)))
            axis.set_yticks(range(len(counts)))
        for row, column in np.argwhere(counts > 0) if len(counts) <= 12 else ():
            dark = shares[row, column] < 0.6
            axis.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=7,
                      color="#ffffff" if dark else "#000000")  # fmt: skip
        return svg(figure)
