"""What the programs that tune an encoder say in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipelines.terminal.texts import human_seconds
from tec_cache.errors import listed
from tec_cache.printable import block, counted, shell_words

if TYPE_CHECKING:
    from pipelines.finetune import FinetuneSummary
    from pipelines.segment import SegmentSummary
    from pipelines.training.tuning import TuningSummary

MOST_CLASSES = 200
"""Classes that are shown one by one; --json has all."""


def finetune_text(summary: FinetuneSummary, dry_run: bool, go_on: str) -> str:
    """Say what a fine-tuning assumed, did and reached; go_on: the command that does the rest."""

    def seen(scores: dict[str, float]) -> str:
        fifth = f", top-5 {scores['test_top5']:.2%}" if "test_top5" in scores else ""
        return f"top-1 {scores['test_top1']:.2%}{fifth}, loss {scores['test_loss']:.4f}"

    lines = _beginning(summary, [f"tuned        {summary.tune}, by the rule {summary.rule}"])
    if not dry_run:
        lines += _end(summary, seen, go_on)
    return block([*lines, "dry run: nothing was written"] if dry_run else lines)


def segment_text(summary: SegmentSummary, dry_run: bool, go_on: str) -> str:
    """Say what a segmentation assumed, did and reached, class by class; go_on: the command that does the rest."""

    def seen(scores: dict[str, float]) -> str:
        mean = f"mIoU {scores['test_miou']:.2%}, pixels {scores['test_pixel_accuracy']:.2%} right"
        return f"{mean}, classes {scores['test_mean_accuracy']:.2%}"

    tuned = f"tuned        {summary.tune}, head {summary.head}; value {summary.ignore} of masks is ignored"
    lines = _beginning(summary, [tuned])
    if dry_run:
        return block([*lines, "dry run: nothing was written"])
    names = summary.class_names or [str(number) for number in range(summary.classes)]
    every = list(zip(names, summary.iou, summary.accuracy, summary.pixels, strict=False))
    rows = [row for row in every if row[1] is not None]
    width = max([len(name) for name, *_ in rows[:MOST_CLASSES]], default=0)
    if rows:
        lines.append("classes      IoU, share of its pixels found, share of all pixels:")
    total = sum(summary.pixels) or 1
    for name, iou, accuracy, pixels in rows[:MOST_CLASSES]:
        lines.append(f"  {name:<{width}}  {_share(iou)}  {_share(accuracy)}  {_share(pixels / total)}")
    if len(rows) > MOST_CLASSES:
        lines.append(f"  and {len(rows) - MOST_CLASSES:,} more: --json")
    if len(rows) < len(every):
        lines.append(f"  {len(every) - len(rows):,} neither in masks nor predicted: not counted")
    if summary.predictions:
        lines.append(
            f"predictions  {summary.predictions}: KEY.png has the classes, KEY.jpg photo, truth and prediction"
        )
    return block([*lines, *_end(summary, seen, go_on)])


def _written(value: Any) -> str:
    """Write a setting."""
    if isinstance(value, tuple):
        return " to ".join(map(_written, value))
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _share(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:7.2%}"


def _beginning(summary: TuningSummary, tuned: list[str]) -> list[str]:
    """Say what was assumed."""
    chosen = ", ".join(f"{name.replace('_', ' ')} {_written(value)}"
                       for name, value in summary.settings.items() if value is not None)  # fmt: skip
    lines = [
        f"run          {summary.run}",
        f"model        {summary.model}: {counted(summary.parameters, 'parameter')}, "
        f"{summary.trained_parameters:,} trained",
        *tuned,
        f"recipe       {summary.recipe}  ({summary.why})",
        f"             {chosen}",
        f"photos       {summary.train_images:,} to learn from, {summary.test_images:,} to judge on, "
        f"{counted(summary.classes, 'class')}",
        f"judged on    {summary.judged_on}",
    ]
    lines += [f"             {remark}" for remark in summary.remarks]
    if summary.left_out:
        lines.append(f"left out     {counted(summary.left_out, 'photo')} of each epoch in no batch, others each time")
    steps = f"{summary.steps:,} of {summary.total_steps:,}, in micro-batches of {summary.micro_batch:,}"
    return [*lines, f"steps        {steps}"]


def _end(summary: TuningSummary, seen: Callable[[dict[str, float]], str], go_on: str) -> list[str]:
    """Say what was reached, how fast, and what comes next. seen: says some scores."""
    lines = []
    for name, scores in (("last epoch", summary.last), ("best epoch", summary.best)):
        if scores:
            note = "  (chosen by the photos that are judged: report the last)" if name == "best epoch" else ""
            lines.append(f"{name:<12} {seen(scores)}, step {int(scores['step']):,}{note}")
    if summary.last and summary.last["test_images"] < summary.test_images:
        judged = int(summary.last["test_images"])
        lines.append(f"judged       {judged:,} of {counted(summary.test_images, 'photo')}: the rest is broken")
    if summary.images_per_second:
        speed = f"{summary.images_per_second:,.1f} images/s, {human_seconds(summary.seconds)} with judging"
        lines.append(f"speed        {speed}; {summary.waited:.1%} of it waiting for photos")
    else:
        lines.append("nothing left to do: this run had reached its last step")
    if summary.damaged:
        lines.append(f"broken       {counted(len(summary.damaged), 'photo')}:")
        lines += [f"  {place}" for place in summary.damaged[:10]]
    if summary.foreign:
        lines.append(f"kept         what is not this run's, {listed(summary.foreign)}")
    if summary.finished:
        lines.append(f"next         tec-cache export {shell_words([summary.run])} OUT")
    else:
        lines += ["interrupted: the checkpoint is kept; go on with", f"  {go_on}"]
    return lines
