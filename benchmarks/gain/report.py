"""What the jobs of `benchmarks.gain` found: tables, the sentences that are true of them, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.fidelity.report import paired_difference, table
from benchmarks.gain.plan import (
    ARMS,
    PIXELS,
    QUESTIONS,
    TEST,
    VALID,
    Gain,
    Job,
    Model,
    arm,
    arm_jobs,
    chosen_epochs,
    fewer_views,
)
from benchmarks.gain.statistics import CONFIDENCE, Hits, Interval, bootstrap

TUNED = ("fine-tuned", "fine-tuned, 10 %")
PROBED = ("kNN", "linear")


@dataclass(frozen=True)
class Found:
    """All that was measured."""

    config: Gain
    curve: dict[int, dict[int, dict[str, float]]]
    """Epochs -> seed -> accuracies of the base on the validation part, 0 to 1."""
    epochs: int
    """E."""
    flat: bool
    """Whether the curve had flattened there."""
    results: dict[Job, dict[str, Any]]
    _known: dict[tuple[str, str, str, int | None], Interval] = field(default_factory=dict)
    """Differences that were computed: tables, sentences and picture ask for the same ones."""

    @classmethod
    def read(cls, out: Path) -> Found:
        """Read the folder of a measurement where all jobs are done."""
        config = Gain.read(json.loads((out / "settings.json").read_text())["config"])
        curve = {epochs: _judged(config, epochs, out) for epochs in config.curve()}
        epochs, flat = chosen_epochs(config, validated(config, out))
        return cls(config, curve, epochs, flat, {job: _result(job, out) for job in arm_jobs(config, epochs)})

    def of(self, model: Model) -> dict[str, Any]:
        """Return what was found of a model on the test photos."""
        return self.results[Job(model, TEST)]

    def each(self, name: str, views: int | None = None) -> list[dict[str, Any]]:
        """Return what was found of an arm, seed by seed."""
        models = [arm(self.config, name, self.epochs, seed) for seed in range(1, self.config.seeds + 1)]
        return [self.of(model if views is None else model._replace(views=views)) for model in models]

    def hits(self, name: str, measure: str, views: int | None = None) -> Hits:
        """Return the hits of an arm's fine-tuned models."""
        rows = [list(map(int, found[f"{measure}, hits"])) for found in self.each(name, views)]
        return np.array(rows, np.float64)

    def difference(self, ours: str, reference: str, measure: str, views: int | None = None) -> Interval:
        """Compare two arms, in percentage points: by photo and seed, or by seed alone where it is a probe."""
        key = ours, reference, measure, views
        if key not in self._known:
            self._known[key] = self._compared(*key)
        return self._known[key]

    def _compared(self, ours: str, reference: str, measure: str, views: int | None) -> Interval:
        if measure in TUNED:
            return bootstrap(self.hits(ours, measure, views), self.hits(reference, measure))
        pairs = [
            {seed: 100 * float(found[measure]) for seed, found in enumerate(self.each(name, given))}
            for name, given in ((ours, views), (reference, None))
        ]
        found = paired_difference(*pairs)
        assert found is not None
        return Interval(found.mean, found.mean - found.half, found.mean + found.half)


def validated(config: Gain, out: Path) -> dict[int, float]:
    """Return epochs -> fine-tuned accuracy of the base on the validation part, mean over the curve's seeds."""
    return {
        epochs: fmean(found[TUNED[0]] for found in _judged(config, epochs, out).values()) for epochs in config.curve()
    }


def _judged(config: Gain, epochs: int, out: Path) -> dict[int, dict[str, Any]]:
    seeds = range(1, config.curve_seeds + 1)
    return {seed: _result(Job(Model(PIXELS, epochs, seed, config.views), VALID), out) for seed in seeds}


def _result(job: Job, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results" / f"{job.name}.json").read_text())
    return found


def markdown(name: str, found: Found, machine: str) -> str:
    """Write all tables."""
    config, (device, _, command) = found.config, machine.strip().partition("\n")
    photos = "all" if config.photos is None else f"{config.photos:,}"
    setting = (
        f"Configuration `{name}`: {photos} photos in {config.views} views, ViT of width {config.width}, depth "
        f"{config.depth}, patches of {config.patch} pixels; batch {config.batch_size}; {config.seeds} seeds; "
        f"fine-tuned for {config.tune_epochs} epochs on all labels, {config.tenth_epochs} on a tenth."
    )
    flat = "has flattened there" if found.flat else "has **not** flattened: its last point but one is taken"
    blocks = [
        f"{device}; `{command}`",
        setting,
        f"**The base's own curve**, validation part of {config.valid:,} photos\n\n{_curve(found)}",
        f"**E = {found.epochs}** epochs: the curve {flat}.",
        f"**Arms**, test photos, mean over the seeds (deviation)\n\n{_arms(found)}",
        f"**Differences**, percentage points, with {CONFIDENCE:.0%} intervals: of the fine-tuned ones by a bootstrap "
        f"over test photos and seeds, of the probes Student's t over the seeds; bold: without zero\n\n"
        f"{_differences(found)}",
        "\n".join(f"- {line}" for line in said(found)),
        f"**What it took**, mean over the seeds\n\n{_costs(found)}",
    ]
    if config.more_views:
        heading = f"**Views**: arm C with other numbers of views, difference from {config.views} views"
        blocks.append(f"{heading}\n\n{_views(found)}")
    return "\n\n".join(blocks)


def _curve(found: Found) -> str:
    rows = []
    for epochs, seeds in found.curve.items():
        steps = epochs * ((found.config.photos or 0) // found.config.batch_size)
        means = [fmean(one[measure] for one in seeds.values()) for measure in (TUNED[0], *PROBED)]
        rows.append([f"{epochs}", f"{steps:,}" if steps else "", *(f"{100 * mean:.1f} %" for mean in means)])
    return table(["epochs", "steps", TUNED[0], *PROBED], rows)


def _arms(found: Found) -> str:
    titles = {"untrained": "random weights", **ARMS}
    rows = []
    for name, title in titles.items():
        of = found.each(name)
        row = [f"{name}: {title}" if name in ARMS else title]
        rows.append(row + [_spread([100 * one[measure] for one in of]) for measure in (*TUNED, *PROBED)])
    return table(["arm", *TUNED, *PROBED], rows)


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f} ({stdev(values):.2f})" if len(values) > 1 else f"{values[0]:.2f}"


def _differences(found: Found) -> str:
    rows = [
        [f"{ours} - {reference}", question]
        + [found.difference(ours, reference, measure).text() for measure in (*TUNED, *PROBED)]
        for question, pairs in QUESTIONS.items()
        for ours, reference in pairs
    ]
    return table(["arms", "question", *TUNED, *PROBED], rows)


def said(found: Found) -> list[str]:
    """Answer each question for each arm in one sentence that is true of the fine-tuned accuracy."""
    names = {"C": "The new model (C)", "B": "The model after rounds (B)"}
    lines = []
    for question, pairs in QUESTIONS.items():
        for ours, reference in pairs:
            seen = found.difference(ours, reference, TUNED[0])
            verdict = "is" if seen.low > 0 else "is worse, not" if seen.high < 0 else "is not shown to be"
            lines.append(f"{names[ours]} {verdict} {question}: {_points(seen)} fine-tuned.")
    return lines


def _points(seen: Interval) -> str:
    return f"{seen.mean:+.2f} points ({seen.low:+.2f} to {seen.high:+.2f})"


def _costs(found: Found) -> str:
    """Write image passes with gradient, those of a base, and hours of making and of all judging."""
    rows = []
    for name in ARMS:
        models = [arm(found.config, name, found.epochs, seed) for seed in range(1, found.config.seeds + 1)]
        seconds = fmean(sum(_made(found, model)) for model in models)
        passes = {"D": 1, "C": 2, "B": 2, "A": 2}[name]
        base = {"C": 1, "B": found.config.rounds - 1}.get(name, 0)
        rows.append([name, f"{passes} E", f"{base * found.config.views} a photo", f"{seconds:,.0f}"])
    return table(["arm", "image passes with gradient", "passes of a base", "seconds, beside other jobs"], rows)


def _made(found: Found, model: Model) -> Iterable[float]:
    for job in (Job(model, "make"), *Job(model, "make").needs(found.config)):
        yield found.results.get(job, {}).get("seconds", math.nan)


def _views(found: Found) -> str:
    rows = []
    for views, _ in fewer_views(found.config, found.epochs, 1):
        texts = [found.difference("C", "C", measure, views).text() for measure in (*TUNED, *PROBED)]
        rows.append([str(views), *texts])
    return table(["views", *TUNED, *PROBED], rows)


def draw(found: Found, path: str) -> None:
    """Draw the base's curve on the left, the differences with their intervals on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for measure in (TUNED[0], *PROBED):
        values = [100 * fmean(one[measure] for one in seeds.values()) for seeds in found.curve.values()]
        left.plot(list(found.curve), values, "o-", label=measure)
    left.axvline(found.epochs, color="grey", linestyle=":", label="E")
    left.set_xscale("log", base=2)
    left.set_xticks(list(found.curve), [str(epochs) for epochs in found.curve])
    left.set(xlabel="epochs of the base", ylabel="accuracy on the validation part, %", title="The base's own curve")
    left.legend()
    pairs = [pair for of in QUESTIONS.values() for pair in of]
    for shift, measure in ((-0.1, TUNED[0]), (0.1, TUNED[1])):
        seen = [found.difference(*pair, measure) for pair in pairs]
        places = [number + shift for number in range(len(pairs))]
        below = [one.mean - one.low for one in seen]
        above = [one.high - one.mean for one in seen]
        right.errorbar(places, [one.mean for one in seen], [below, above], fmt="o", capsize=4, label=measure)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set_xticks(range(len(pairs)), [f"{ours} - {reference}" for ours, reference in pairs])
    title = "D: base, C: new model, B: rounds,\nA: base trained for twice as long"
    right.set(ylabel=f"difference on test photos, points, {CONFIDENCE:.0%}", title=title)
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
