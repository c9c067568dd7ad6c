#!/usr/bin/env python3
"""What a cache and its trainings take, large and small: bytes, bytes per second and hours, each with its arithmetic.

    python -m benchmarks.scaling --load-rate L --image-seconds S --target-seconds C --base-rate B --step-rate T

Nothing is measured here. The five rates come from the other benchmarks, on the machine that `--cores` describes; what
depends on one that was not given is called not measured. No GPU was measured: its rates are computed from the time
that the paper's authors published.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from pipelines.planning.result import HOUR

IMAGENET, BILLION = 1_281_167, 1_000_000_000

CROP_BYTES = 17_900
"""Of a stored crop: docs/quality.md."""
TARGET_BYTES = {"ViT-S/14": 14_015, "ViT-B/16": 22_869}
"""Of one view's targets at the default quality: docs/quality.md. ViT-B's are of random weights."""

PUBLISHED_HOURS, PUBLISHED_GPUS, PUBLISHED_EPOCHS = 25, 8, 300
"""TEC on ImageNet-1k, ViT-B/16 from ViT-B/16, the base in the loop, on A100s: arXiv 2210.11016."""
BASE_GMAC, STUDENT_GMAC = 17.6, 8.3
"""Of one view, forward; a backward pass takes twice as many as a forward pass."""

MEASURED, COMPUTED, PUBLISHED = "measured", "computed", "computed from a published figure"


@dataclass(frozen=True)
class Rates:
    """How fast one device computes, and one core works on images; None where that was not measured."""

    load: float | None
    """Views per second that one core loads for training."""
    image_seconds: float | None
    """Of one core, to decode, crop and encode one view in stage one."""
    target_seconds: float | None
    """Of one core, to compress and write the targets of one view in stage one. Coding is the device's work."""
    base: float | None
    """Views per second of one device."""
    step: float | None
    """Views per second of one device, in a training step without the base."""


@dataclass(frozen=True)
class Case:
    """A column: so many photos on such machines."""

    title: str
    photos: int
    views: int
    epochs: int
    model: str
    nodes: int
    devices: int
    """Of a node."""
    cores: int
    """Of a node."""
    rates: Rates
    rates_kind: str
    """Where the devices' rates are from."""

    @property
    def on_cores(self) -> bool:
        """Whether the base runs on the cores that also work on the images."""
        return self.rates_kind == MEASURED


@dataclass(frozen=True)
class Figure:
    """A number with its unit, how it came about, and whether that was measured; no number where it was not."""

    value: float | None
    unit: str
    arithmetic: str
    kind: str

    def __str__(self) -> str:
        return f"{number(self.value)} {self.unit}".strip() if self.value is not None else "not measured"


def published_views() -> float:
    """Return the views per second of one GPU with the base in the loop, as published."""
    return IMAGENET * PUBLISHED_EPOCHS / (PUBLISHED_HOURS * HOUR * PUBLISHED_GPUS)


def published_rates(load: float | None, image_seconds: float | None, target_seconds: float | None) -> Rates:
    """Divide the published time among base and student by their multiply-accumulates; the cores' rates are measured."""
    gmacs = published_views() * (BASE_GMAC + 3 * STUDENT_GMAC)
    return Rates(load, image_seconds, target_seconds, gmacs / BASE_GMAC, gmacs / (3 * STUDENT_GMAC))


def published_text() -> str:
    """Say how the GPU's rates were computed."""
    rates, views, student = published_rates(None, None, None), number(published_views()), 3 * STUDENT_GMAC
    both = BASE_GMAC + student
    return (
        f"An A100, computed from the published {PUBLISHED_HOURS} h: {IMAGENET:,} x {PUBLISHED_EPOCHS} views / "
        f"({PUBLISHED_HOURS} h x {PUBLISHED_GPUS}) = {views} views/s with the base in the loop. A view takes "
        f"{BASE_GMAC} GMAC of the base and 3 x {STUDENT_GMAC} = {student:.1f} of the student, forward and backward. "
        f"If all take equally long, the base alone runs {views} x {both:.1f} / {BASE_GMAC} = {_text(rates.base)} "
        f"views/s, and the step without it {views} x {both:.1f} / {student:.1f} = {_text(rates.step)}."
    )


def number(value: float) -> str:
    """Write three digits that count, with commas."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def figures(case: Case) -> dict[str, Figure]:
    """Return every row of a case."""
    rates, target = case.rates, TARGET_BYTES[case.model]
    per_view = CROP_BYTES + target
    views, shown = case.photos * case.views, case.photos * case.epochs
    devices, cores = case.nodes * case.devices, case.nodes * case.cores
    disk = views * per_view
    rows = {
        "stored views": Figure(views, "", f"{case.photos:,} photos x {case.views}", COMPUTED),
        "bytes of a view": Figure(per_view / 1e3, "KB", f"crop {CROP_BYTES:,} + targets {target:,} B", MEASURED),
        "disk": Figure(disk / 1e12, "TB", f"{views:,} x {per_view:,} B", COMPUTED),
    }
    images = _hours(views, _times(1 / rates.image_seconds if rates.image_seconds else None, cores))
    targets = _hours(views, _times(1 / rates.target_seconds if rates.target_seconds else None, cores))
    base = _hours(views, _times(rates.base, devices))
    for name, hours, each in (("images", images, rates.image_seconds), ("compressing", targets, rates.target_seconds)):
        rows[f"stage one: {name}"] = Figure(hours, "h", f"{views:,} x {_text(each)} s / {cores} cores", COMPUTED)
    rows["stage one: base"] = Figure(base, "h", f"{views:,} / ({_text(rates.base)} views/s x {devices})", _kind(case))
    both = None
    if images is not None and targets is not None and base is not None:
        both = images + targets + base if case.on_cores else max(images + targets, base)
    how = "their sum: the same cores do all" if case.on_cores else "the base, or the cores' two if longer: they overlap"
    rows["stage one"] = Figure(both, "h", how, _kind(case))
    rows["stage one: written"] = Figure(disk / both / HOUR / 1e6 if both else None, "MB/s", "disk / hours", _kind(case))
    speed = _times(rates.step, devices)
    rows["training: views"] = Figure(speed, "views/s", f"{_text(rates.step)} x {devices}", _kind(case))
    read = speed * per_view / case.nodes / 1e6 if speed else None
    rows["training: read, a node"] = Figure(
        read, "MB/s", f"{_text(speed)} views/s x {per_view:,} B / {case.nodes} nodes", _kind(case)
    )
    wanted = rates.step / rates.load if rates.step and rates.load else None
    rows["training: cores for a device"] = Figure(
        wanted, "cores", f"{_text(rates.step)} / {_text(rates.load)} views/s of a core", _kind(case)
    )
    rows["training: an epoch"] = Figure(
        _hours(case.photos, speed), "h", f"{case.photos:,} / {_text(speed)} views/s", _kind(case)
    )
    rows["training: all epochs"] = Figure(
        _hours(shown, speed), "h", f"{case.photos:,} x {case.epochs} / {_text(speed)} views/s", _kind(case)
    )
    return rows


def _kind(case: Case) -> str:
    return PUBLISHED if case.rates_kind == PUBLISHED else COMPUTED


def _times(rate: float | None, count: int) -> float | None:
    return rate * count if rate else None


def _hours(amount: float, rate: float | None) -> float | None:
    return amount / rate / HOUR if rate else None


def _text(value: float | None) -> str:
    return number(value) if value else "(not measured)"


def markdown(cases: list[Case]) -> str:
    """Write the table, a column a case, and below it each figure's arithmetic."""
    columns = [figures(case) for case in cases]
    lines = ["| | " + " | ".join(case.title for case in cases) + " |", "|---" * (len(cases) + 1) + "|"]
    short = {MEASURED: "m", COMPUTED: "c", PUBLISHED: "p"}
    for name in columns[0]:
        cells = [f"{c[name]} ({short[c[name].kind]})" if c[name].value is not None else str(c[name]) for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "; ".join(f"{letter}: {kind}" for kind, letter in short.items()) + ". The arithmetic:", ""]
    lines.append(f"- {published_text()}")
    for name in columns[0]:
        found = [f"{c[name].arithmetic} = {c[name]}" for c in columns]
        lines.append(f"- {name}: " + "; ".join(dict.fromkeys(found)))
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load-rate", type=float, help="views/s that one core loads")
    parser.add_argument("--image-seconds", type=float, help="seconds of a core for one view's image work in stage one")
    parser.add_argument("--target-seconds", type=float, help="seconds of a core to compress and write a view's targets")
    parser.add_argument("--base-rate", type=float, help="views/s of the base on the measured machine")
    parser.add_argument("--step-rate", type=float, help="views/s of the cached step on the measured machine")
    parser.add_argument("--model", choices=TARGET_BYTES, default="ViT-B/16", help="whose the measured rates are")
    parser.add_argument("--cores", type=int, default=2, help="of the measured machine")
    parser.add_argument("--node-gpus", type=int, default=8)
    parser.add_argument("--node-cores", type=int, default=128)
    parser.add_argument("--nodes", type=int, default=16, help="for a billion photos")
    parser.add_argument("--views", type=int, nargs=2, default=(4, 1), help="of ImageNet-1k, of a billion photos")
    parser.add_argument("--epochs", type=int, nargs=2, default=(300, 10))
    args = parser.parse_args()
    here = Rates(args.load_rate, args.image_seconds, args.target_seconds, args.base_rate, args.step_rate)
    there = published_rates(args.load_rate, args.image_seconds, args.target_seconds)
    views, epochs, gpus, cores = args.views, args.epochs, args.node_gpus, args.node_cores
    node = f"{gpus} A100, {cores} cores"
    print(
        markdown(
            [
                Case(f"ImageNet-1k, {views[0]} views, {epochs[0]} epochs; {args.cores} cores, no GPU", IMAGENET,
                     views[0], epochs[0], args.model, 1, 1, args.cores, here, MEASURED),
                Case(f"ImageNet-1k, {views[0]} views, {epochs[0]} epochs; {node}", IMAGENET,
                     views[0], epochs[0], "ViT-B/16", 1, gpus, cores, there, PUBLISHED),
                Case(f"a billion, {views[1]} view, {epochs[1]} epochs; {args.nodes} nodes of {node}",
                     BILLION, views[1], epochs[1], "ViT-B/16", args.nodes, gpus, cores, there, PUBLISHED),
            ]
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
