"""The page around the sections: one HTML document that needs nothing but itself."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from pipelines.reporting.html import Html, element, heading, joined, paragraph, place, table, text
from pipelines.reporting.style import STYLE
from pipelines.reporting.subjects import Subject, state
from tec_cache import __version__

GENERATOR = '<meta name="generator" content="tec-cache report">'
"""Says that a file is a report, which a later one may replace."""
MOST_NAMES = 4
"""Names in the title."""
# whatever a name in a folder holds: no script runs, and nothing is fetched
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def whole_page(subjects: Sequence[Subject], sections: Sequence[tuple[str, str, Html]]) -> str:
    """Return the document. sections: (anchor, title, content) in their order; empty ones are left out."""
    kept = [(anchor, title, content) for anchor, title, content in sections if content]
    links = joined(element("li", Html(f'<a href="#{anchor}">{text(title)}</a>')) for anchor, title, _ in kept)
    names = [subject.name for subject in subjects]
    title = f"Report on {', '.join(names[:MOST_NAMES])}" + (", ..." if len(names) > MOST_NAMES else "")
    body = [
        element("header", joined([heading(1, title), _made(), _contents(subjects)])),
        element("nav", element("ul", links), aria_label="Sections"),
        element("main", joined(element("section", content, id=f"part-{anchor}") for anchor, _, content in kept)),
    ]
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        GENERATOR,
        f"<title>{text(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    parts = ["<!DOCTYPE html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>"]
    return "\n".join(parts) + "\n"


def _made() -> Html:
    return paragraph(f"Made on {datetime.date.today().isoformat()} by tec-cache {__version__}", kind="made")


def _contents(subjects: Sequence[Subject]) -> Html:
    rows = [[subject.letter, place(subject.place), subject.kind.value, state(subject)] for subject in subjects]
    return table(["", "place", "what it is", "state"], rows, caption="What this report is about", numbers=False)
