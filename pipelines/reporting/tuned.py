"""Fine-tunings and segmentations: accuracy over epochs, which classes are taken for which, predictions over photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipelines.judging.pictures import MARK, palette
from pipelines.reporting.charts import confusion_plot
from pipelines.reporting.html import NOTHING, Html, grid, heading, joined, paragraph, picture, place, table, text
from pipelines.reporting.images import jpeg, shrunk
from pipelines.reporting.judged import Judged, judge_classifier, judge_segmenter, spread
from pipelines.reporting.logged import Logged
from pipelines.reporting.runs import TITLES, shown
from pipelines.reporting.subjects import Subject
from tec_cache.device import Compute
from tec_cache.printable import are, counted
from tec_cache.segment.scores import Scores

MAIN = {"classify": "test_top1", "segment": "test_miou"}
"""Task -> the score by which its epochs are compared."""
MOST_PAIRS, MOST_NAMED = 12, 60
STRIP = 720
"""Pixels of photo, truth and prediction side by side."""


def scores_part(runs: Sequence[tuple[Subject, Logged]]) -> Html:
    """Return a table of the last and the best judgement of each run."""
    rows = []
    for subject, logged in runs:
        main = MAIN[str(subject.task)]
        judged = [line for line in logged.lines if main in line]
        if judged:
            last, best = judged[-1], max(judged, key=lambda line: line[main])
            at = f"{best['step'] / logged.steps_per_epoch:g}"
            rows.append(
                [subject.title, TITLES[main], len(judged), shown(main, last[main]), shown(main, best[main]), at]
            )
    if not rows:
        return paragraph("None of them has been judged yet.", kind="note")
    head = ["run", "score", "judgements", "last", "best", "epoch of the best"]
    caption = "The last is what to report: the best was chosen by looking at the photos that are judged"
    return table(head, rows, caption=caption)


def confusion_part(subject: Subject, photos: str | None, limit: int, pictures: int, compute: Compute) -> Html:
    """Judge a tuned model on photos, and show which classes it takes for which; say so where none are given."""
    if photos is None:
        said = "A run's folder keeps scores, not what was confused: give photos with labels, or masks, by --photos."
        return paragraph(said, kind="note")
    if subject.task == "classify":
        judged = judge_classifier(subject.folder, photos, limit, compute)
    else:
        judged = judge_segmenter(subject.folder, photos, limit, pictures, compute)
    return _judged(subject, judged, photos)


def _judged(subject: Subject, judged: Judged, photos: str) -> Html:
    counts = judged.counts
    part = "all" if judged.photos == judged.of else f"{judged.photos:,} of"
    broken = f"; {judged.broken:,} of them {are(judged.broken)} broken and left out" if judged.broken else ""
    about = paragraph(
        f"The last checkpoint on {part} {counted(judged.of, 'photo')} of ", place(photos), broken, kind="note"
    )
    right, total = int(np.trace(counts)), int(counts.sum())
    if not total:
        return joined([about, paragraph("None of them is of a known class.", kind="note")])
    unit = "photos" if subject.task == "classify" else "pixels"
    score = f"{100 * right / total:.2f} % of the {unit} are right"
    if subject.task == "segment":
        score += f"; mean intersection over union {100 * Scores.of(torch.from_numpy(counts)).mean_iou:.2f} %"
    alt = f"confusions of {subject.title}: {right:,} of {total:,} {unit} lie on the diagonal"
    plot = picture(confusion_plot(counts), alt, f"share of a class's {unit}; {score}")
    pairs = _pairs(judged, unit)
    parts = [about, grid([plot], "plots"), pairs, _names(judged.classes, coloured=bool(judged.strips))]
    return joined([*parts, strips_part(judged.strips)])


def _pairs(judged: Judged, unit: str) -> Html:
    """Return a table of the pairs that are confused most."""
    wrong = judged.counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    rows = []
    for true, said in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[true, said]:
            share = wrong[true, said] / judged.counts[true].sum()
            rows.append([_name(judged, int(true)), _name(judged, int(said)), f"{wrong[true, said]:,}",
                         f"{100 * share:.1f} %"])  # fmt: skip
    return table(["class", "taken for", unit, "of the class"], rows, caption="Confused most often")


def _name(judged: Judged, number: int) -> str:
    return str(number) if judged.classes is None else f"{number} {judged.classes[number]}"


def _names(classes: tuple[str, ...] | None, *, coloured: bool) -> Html:
    """Say what the numbers of the classes mean, and which colours they have over photos."""
    if classes is None or len(classes) > MOST_NAMED:
        return NOTHING
    colours = palette(len(classes))
    patches = [Html(f'<span class="key" style="background:rgb({r},{g},{b})" aria-hidden="true"></span>')
               for r, g, b in colours.tolist()]  # fmt: skip
    said = [Html(f"{patches[i] if coloured else ''}{text(f'{i} {name}')}") for i, name in enumerate(classes)]
    return paragraph("Classes: ", Html(", ".join(said)), kind="note")


def strips_part(strips: Sequence[tuple[str, npt.NDArray[np.uint8]]]) -> Html:
    """Show photos with their truth and prediction beside them."""
    figures = [picture(jpeg(shrunk(pixels, STRIP)), f"{key}: photo, true classes and predicted classes", key)
               for key, pixels in strips]  # fmt: skip
    return joined([heading(4, "Photo, truth, prediction"), grid(figures, "strips")]) if figures else NOTHING


def predictions_part(subject: Subject, count: int) -> Html:
    """Show some of the predictions that a segmentation wrote, where they are still there."""
    assert subject.about is not None
    folder = subject.about["config"].get("save_predictions")
    if not folder or not (Path(folder) / MARK).is_file():
        return NOTHING
    files = sorted(Path(folder).rglob("*.jpg"))
    strips = []
    for number in spread(len(files), count):
        with Image.open(files[number]) as image:
            strips.append((str(files[number].relative_to(folder).with_suffix("")), np.asarray(image.convert("RGB"))))
    if not strips:
        return NOTHING
    return joined([heading(3, f"{subject.title}: saved predictions"), strips_part(strips)])
