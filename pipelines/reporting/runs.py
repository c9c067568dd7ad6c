"""Runs side by side: how far they are, what they were asked, and the curves of what they logged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipelines.reporting.charts import Line, colour, lines_plot, thinned
from pipelines.reporting.html import (
    NOTHING,
    Html,
    element,
    grid,
    heading,
    joined,
    paragraph,
    picture,
    place,
    problem,
    table,
    text,
)
from pipelines.reporting.logged import Logged
from pipelines.reporting.subjects import Subject, state
from tec_cache.run.settings import PROGRAMS

Run = tuple[Subject, Logged]

SECTIONS = {"pretrain": "Pretraining", "classify": "Fine-tuning", "segment": "Segmentation"}
"""Task -> title of its runs' section."""
TITLES = {
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "images_per_second": "images per second, since the point before",
    "waited": "share of the time spent waiting for the loader",
    "loss": "loss, as it is minimized",
    "probe_knn": "probe: nearest neighbours",
    "probe_linear": "probe: linear classifier",
    "test_top1": "top-1 accuracy",
    "test_top5": "top-5 accuracy",
    "test_loss": "loss on the photos that are judged",
    "test_miou": "mean intersection over union",
    "test_pixel_accuracy": "share of the pixels that are right",
    "test_mean_accuracy": "share of a class's pixels that are right, mean over classes",
}
"""What the numbers of metrics.jsonl are called on the page."""
_HASH = re.compile("[0-9a-f]{64}")
_NO_SHARE = {"test_loss"}


def swatch(number: int) -> Html:
    """Return a patch of a run's colour."""
    return Html(f'<span class="key" style="background:{colour(number)}" aria-hidden="true"></span>')


def runs_section(task: str, runs: Sequence[Run]) -> Html:
    """Say what the runs of one program are, show their curves, and how they were asked for different things."""
    subjects, named = [subject for subject, _ in runs], _by_set(runs)
    parts = [heading(2, SECTIONS[task], task), overview(named)]
    for subject, logged in runs:
        if not logged.lines:
            parts.append(paragraph(f"{subject.letter} has logged nothing yet, so it has no curve.", kind="note"))
        if logged.unreadable:
            said = f"{subject.letter}: {logged.unreadable:,} of the lines of metrics.jsonl cannot be read"
            parts.append(paragraph(f"{said}; of a run that is writing, the last one may be half there.", kind="note"))
    parts += [
        curves(named, "Losses", f"{task}-losses", _union(logged.losses for _, logged in named), zero=False),
        curves(
            runs,
            "Learning rate, gradient and speed",
            f"{task}-speed",
            ["lr", "grad_norm", "images_per_second", "waited"],
            zero=True,
        ),
        curves(
            runs, "Pull of each target set", f"{task}-sets", _union(logged.of_sets for _, logged in runs), zero=True
        ),
        curves(runs, "Judged on the way", f"{task}-judged", _union(logged.scores for _, logged in runs), zero=False),
        differences(subjects, f"{task}-settings"),
    ]
    return joined(parts)


def _by_set(runs: Sequence[Run]) -> list[Run]:
    """Name the losses of a run of one target set as those of a run of several are named, where both learn from it."""
    several = {name for _, logged in runs for name in logged.losses if "/" in name}
    found = []
    for subject, logged in runs:
        targets = (subject.about or {}).get("targets") or [{}]
        names = {name: f"{targets[0].get('name')}/{name}" for name in logged.losses} if len(targets) == 1 else {}
        found.append((subject, logged.renamed({old: new for old, new in names.items() if new in several})))
    return found


def overview(runs: Sequence[Run]) -> Html:
    """Return a table with a column for each run."""
    rows: dict[str, list[object]] = {}
    for column, (subject, logged) in enumerate(runs):
        for name, value in _facts(subject, logged).items():
            rows.setdefault(name, [None] * len(runs))[column] = value
    head = ["", *(Html(swatch(s.number) + text(s.title)) for s, _ in runs)]
    return table(head, [[name, *values] for name, values in rows.items()], caption="The runs", numbers=False)


def _facts(subject: Subject, logged: Logged) -> dict[str, object]:
    about = subject.about
    assert about is not None
    config = about["config"]
    facts: dict[str, object] = {
        "folder": place(subject.place),
        "made by": f"tec-cache {PROGRAMS[about['task']]}",
        "state": state(subject),
        "epochs": f"{config.get('epochs')}, batch {config.get('batch_size'):,}",
    }
    if about["task"] == "pretrain":
        facts |= {"model": config.get("student"), "learns from": _targets(about["targets"]),
                  "cache": place(config.get("cache"))}  # fmt: skip
    else:
        facts |= {"model": f"{config.get('model')} ({about['model'].get('architecture')})",
                  "tuned": f"{config.get('tune')}, recipe {about['recipe']}", "photos": place(config.get("train")),
                  "classes": f"{about['num_classes']:,}"}  # fmt: skip
    for name in [*logged.losses, *logged.scores]:
        value = logged.last(name)
        facts[f"last {title_of(name)}"] = None if value is None else shown(name, value)
    return facts


def shown(name: str, value: float) -> str:
    """Write a number of metrics.jsonl as people read it."""
    return f"{100 * value:.2f} %" if is_share(name) else f"{value:.4g}"


def title_of(name: str) -> str:
    """Say what a number of metrics.jsonl is; a loss is named KIND, or SET/KIND where there are several target sets."""
    if name in TITLES:
        return TITLES[name]
    of_set, _, kind = name.rpartition("/")
    of_sets = {"gradient": "norm of its weighted gradient at the encoder", "weight": "weight that follows its gradient"}
    if kind in of_sets:
        return f"target set {of_set}: {of_sets[kind]}"
    return f"{kind} loss, target set {of_set}" if of_set else f"{kind} loss"


def is_share(name: str) -> bool:
    """Say whether a number is a share of 1."""
    return name == "waited" or (name.startswith(("probe_", "test_")) and name not in _NO_SHARE)


def _targets(targets: Sequence[dict[str, Any]]) -> str:
    kinds = {"cached": "target set {name}", "online": "base in the loop", "pixels": "pixels"}
    found = [kinds.get(of["kind"], "unknown").format(name=of.get("name")) for of in targets]
    return ", ".join(f"{what} (weight {of['weight']:g})" if len(targets) > 1 else what
                     for what, of in zip(found, targets, strict=True))  # fmt: skip


def curves(runs: Sequence[Run], title: str, anchor: str, names: Sequence[str], *, zero: bool) -> Html:
    """Draw a plot for each number that any of the runs has logged."""
    figures = [_curve(runs, name, zero=zero and name != "lr") for name in names]
    inner = grid(figures, "plots")
    return joined([heading(3, title, anchor), inner]) if inner else NOTHING


def _curve(runs: Sequence[Run], name: str, *, zero: bool) -> Html:
    lines, said = [], []
    for subject, logged in runs:
        x, y = logged.points(name)
        if x:
            lines.append(Line(subject.letter, subject.number, *thinned(x, y)))
            last = f"{subject.letter} from {shown(name, y[0])} to {shown(name, y[-1])} at epoch {x[-1]:g}"
            said.append(last)
    if not lines:
        return NOTHING
    title = title_of(name)
    return picture(
        lines_plot(lines, percent=is_share(name), zero=zero), f"{title} over epochs: {'; '.join(said)}", title
    )


def _union(lists: Any) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


def flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested settings by their whole names, NAME.PART; lists are values."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{above}{name}"
        found |= flat(value, key + ".") if isinstance(value, dict) and value else {key: value}
    return found


def asked(about: dict[str, Any]) -> dict[str, Any]:
    """Return all that a run was asked for, and what followed from it, by name; not where it was written to."""
    settings = flat({name: value for name, value in about["config"].items() if name != "out"})
    settings |= {"task": about["task"], "total_steps": about["total_steps"]}
    settings |= {f"targets.{number}": _target(of) for number, of in enumerate(about.get("targets", []))}
    for name in ("num_views", "cache_fingerprint", "recipe", "rule", "num_classes"):
        settings |= {name: about[name]} if name in about else {}
    return settings | flat(about.get("model", {}), "model.") if isinstance(about.get("model"), dict) else settings


def _target(of: dict[str, Any]) -> str:
    """Write down what a run learns of one set of targets."""
    named = {
        "set": of.get("name"),
        "weight": of["weight"],
        "tau": of["tau"],
        "targets": str(of.get("fingerprint"))[:12],
    }
    parts = [f"{name} {value}" for name, value in (named | of["spec"]).items() if value not in (None, "None")]
    base = of.get("base")
    parts += [f"{name} {value}" for name, value in flat(base).items()] if isinstance(base, dict) else []
    return f"{of['kind']}: {', '.join(parts)}"


def differences(subjects: Sequence[Subject], anchor: str) -> Html:
    """Return a table of the settings in which the runs differ."""
    if len(subjects) < 2:
        return NOTHING
    every = [asked(subject.about) for subject in subjects if subject.about is not None]
    names = sorted({name for settings in every for name in settings})
    differing = [n for n in names if len({repr(settings.get(n, ...)) for settings in every}) > 1]
    title = heading(3, "Settings that differ", anchor)
    if not differing:
        return joined([title, paragraph("None: they were asked for the same.")])
    rows = [[element("code", name), *(_value(settings, name) for settings in every)] for name in differing]
    head = ["setting", *(Html(swatch(s.number) + text(s.title)) for s in subjects)]
    return joined([title, table(head, rows, caption="A dash: this run has no such setting", numbers=False)])


def _value(settings: dict[str, Any], name: str) -> object:
    value = settings.get(name)
    if name not in settings:
        return None
    if isinstance(value, str):
        if _HASH.fullmatch(value):
            return element("code", value[:12])
        return place(value) if "/" in value else value
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "not given" if value is None else str(value)


def unreadable(subjects: Sequence[Subject]) -> Html:
    """Say which places cannot be read, and why."""
    return joined(
        Html(heading(3, subject.title) + problem(subject.error)) for subject in subjects if subject.error is not None
    )
