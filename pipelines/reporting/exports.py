"""Exports side by side: what they are, and what they came from."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.reporting.html import Html, element, heading, joined, place, table, text
from pipelines.reporting.runs import TITLES, shown
from pipelines.reporting.subjects import Subject


def exports_section(subjects: Sequence[Subject]) -> Html:
    """Return a table with a column for each export."""
    columns = [_facts(subject) for subject in subjects]
    names = list(dict.fromkeys(name for facts in columns for name in facts))
    rows = [[name, *(facts.get(name) for facts in columns)] for name in names]
    head = ["", *(text(subject.title) for subject in subjects)]
    return joined([heading(2, "Exports", "exports"), table(head, rows, caption="The exports", numbers=False)])


def _facts(subject: Subject) -> dict[str, object]:
    about = subject.about
    assert about is not None
    facts: dict[str, object] = {
        "folder": place(subject.place),
        "architecture": about["architecture"],
        "changed": ", ".join(f"{name} {value}" for name, value in about["model_args"].items()),
        "parameters": f"{about['parameters']:,}",
        "weights, SHA-256": element("code", about["weights_sha256"]),
        "from run": place(about["run"]),
        "task": about["task"],
        "step": f"{about['step']:,}",
    }
    if about["task"] == "pretrain":
        return facts | {"cache": place(about["cache"])}
    scores = {TITLES.get(name, name): shown(name, value) for name, value in about["scores"].items()
              if name in TITLES and name.startswith("test_")}  # fmt: skip
    return facts | {"photos": place(about["train"])} | scores
