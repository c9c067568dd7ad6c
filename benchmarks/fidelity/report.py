"""What the runs of `benchmarks.fidelity` say: paired differences with intervals, tables, a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from benchmarks.fidelity.plan import BASE, UNTRAINED, Cell, Fidelity, quality_cells, view_cells
from tec_cache.errors import TecCacheError

MARKS = "<!-- tables: begin -->", "<!-- tables: end -->"
"""Lines of a document between which `--markdown` writes."""
UNRESOLVED = "no difference resolved"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measure:
    """One number by which a model is judged."""

    key: str
    title: str
    scale: float
    digits: int
    unit: str = ""

    def value(self, x: float) -> str:
        """Write a mean of it."""
        return f"{x * self.scale:.{self.digits}f}{self.unit}"


MEASURES = (
    Measure("loss", "held-out loss", 1, 4),
    Measure("feature", "of it features", 1, 4),
    Measure("attention", "of it attention", 1, 4),
    Measure("knn", "kNN", 100, 1, " %"),
    Measure("linear", "linear", 100, 1, " %"),
)
"""Differences of accuracies are in percentage points."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and half the width of its interval: infinite with fewer than two pairs."""

    mean: float
    half: float

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves zero out."""
        return abs(self.mean) > self.half

    def text(self, measure: Measure) -> str:
        """Write mean and interval; where the interval contains zero, say that first."""
        half = f"{self.half * measure.scale:.{measure.digits}f}" if math.isfinite(self.half) else "unknown"
        text = f"{self.mean * measure.scale:+z.{measure.digits}f} ± {half}"
        return text if self.resolved else f"{UNRESOLVED} ({text})"


def paired_difference(ours: dict[int, float], reference: dict[int, float]) -> Difference | None:
    """Compare two cells by the seeds they share, each given as seed -> value; None without any.

    The interval is Student's t for n - 1 degrees of freedom: t * s / sqrt(n), s the deviation of the differences.
    """
    pairs = [ours[seed] - reference[seed] for seed in ours if seed in reference]
    if not pairs:
        return None
    half = math.inf
    if len(pairs) > 1:
        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1))
        half = quantile * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.fmean(pairs), half)


def by_seed(results: Iterable[dict[str, Any]], cell: Cell, key: str) -> dict[int, float]:
    """Return seed -> value of a cell's finished runs."""
    return {r["seed"]: r[key] for r in results if (r["kind"], r["views"]) == tuple(cell) and key in r}


def markdown(
    name: str, config: Fidelity, results: list[dict[str, Any]], sizes: dict[str, dict[str, Any]], machine: str
) -> str:
    """Write all tables. sizes: quality -> what `info` says of its target set."""
    device, _, command = machine.partition("\n")
    photos = "all" if config.images is None else f"{config.images:,}"
    setting = (
        f"Configuration `{name}`: {photos} photos, {config.epochs} epochs (base: {config.base_epochs}), "
        f"width {config.width}, depth {config.depth}, batch {config.batch_size}, {config.mask_ratio:.0%} masked, "
        f"{config.seeds} seeds."
    )
    axes = [
        ("How targets are stored", quality_cells(config)),
        ("How many views are stored", view_cells(config)),
    ]
    blocks = [f"{device}; `{command}`", setting]
    for title, cells in axes:
        heading = f"**{title}**: difference from *{cells[0].label(config)}*, mean ± {CONFIDENCE:.0%} interval"
        blocks.append(heading + "\n\n" + _differences(cells, config, results))
    blocks.append("**Means over the seeds**\n\n" + _means(config, results))
    blocks.append("**What was stored**\n\n" + _sizes(sizes))
    return "\n\n".join(blocks)


def _differences(cells: list[Cell], config: Fidelity, results: list[dict[str, Any]]) -> str:
    """Write what each cell differs by from the first."""
    rows = []
    for cell in cells[1:]:
        pairs = [paired_difference(by_seed(results, cell, m.key), by_seed(results, cells[0], m.key)) for m in MEASURES]
        texts = ["-" if d is None else d.text(m) for m, d in zip(MEASURES, pairs, strict=True)]
        rows.append([cell.label(config), *texts])
    return table(["model", *(measure.title for measure in MEASURES)], rows)


def _means(config: Fidelity, results: list[dict[str, Any]]) -> str:
    """Write the means over the seeds of every cell, and of base and untrained models to compare with."""
    rows = []
    for cell in dict.fromkeys([Cell(UNTRAINED, 0), Cell(BASE, 0), *quality_cells(config), *view_cells(config)]):
        values = [by_seed(results, cell, measure.key).values() for measure in MEASURES]
        texts = [m.value(statistics.fmean(v)) if v else "-" for m, v in zip(MEASURES, values, strict=True)]
        rows.append([cell.label(config), *texts])
    return table(["model", *(measure.title for measure in MEASURES)], rows)


def _sizes(sizes: dict[str, dict[str, Any]]) -> str:
    """Write bytes and measured errors of the target sets."""
    rows = [
        [name, f"{s['bytes_per_view']:,.0f}", f"{s['errors'].get('mse', 0):.2g}", f"{s['errors'].get('kl', 0):.2g}"]
        for name, s in sizes.items()
    ]
    return table(["quality", "bytes per view", "relative MSE of features", "KL of attention, nats"], rows)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def put_between_marks(path: Path, tables: str, marks: tuple[str, str] = MARKS) -> None:
    """Replace what a document has between its marks; a document that is not there yet is the tables alone."""
    begin, end = marks
    text = path.read_text() if path.exists() else f"{begin}\n{end}\n"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise TecCacheError(
            "the document has no place for the tables", where=str(path), todo=f"add the lines {begin} and {end}"
        )
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text(f"{before}{begin}\n{tables}\n{end}{after}")


def draw(config: Fidelity, results: list[dict[str, Any]], path: str) -> None:
    """Draw differences of the held-out loss with their intervals: against quality left, against views right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    qualities, views = quality_cells(config), view_cells(config)
    _curve(left, [cell.kind for cell in qualities], qualities, qualities[0], results, "", "C0")
    left.set(xlabel=f"targets, {config.quality_views} views", ylabel="held-out loss, difference from online")
    ticks = [str(number) for number in sorted(config.views)] + ["new in\nevery epoch"]
    for kind, colour in (("exact", "C0"), ("default", "C1")):
        cells = sorted(cell for cell in views if cell.kind == kind)
        _curve(right, ticks, cells, views[0], results, kind, colour)
    right.set(xlabel="views", ylabel="held-out loss, difference from\nexact targets, new view in every epoch")
    right.legend()
    for axis in (left, right):
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
    figure.suptitle(f"Mean and {CONFIDENCE:.0%} interval of paired differences, {config.seeds} seeds; lower is better")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curve(
    axis: Any, names: list[str], cells: list[Cell], reference: Cell, results: list[dict[str, Any]], label: str,
    colour: str,
) -> None:  # fmt: skip
    """Draw one cell after another as points with intervals; the reference itself is zero by definition."""
    found = [paired_difference(by_seed(results, c, "loss"), by_seed(results, reference, "loss")) for c in cells]
    points = [(name, d) for name, d in zip(names, found, strict=True) if d is not None]
    shift = 0.08 if label == "default" else 0.0  # else the intervals of two curves lie on each other
    places = [names.index(name) + shift for name, _ in points]
    halves = [d.half if math.isfinite(d.half) else 0.0 for _, d in points]
    axis.errorbar(places, [d.mean for _, d in points], halves, fmt="o-", capsize=4, color=colour, label=label or None)
    axis.set_xticks(range(len(names)), names)
