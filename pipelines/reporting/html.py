"""Pieces of HTML. What is no `Html` is escaped, without credentials and hidden characters: it came from a file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from tec_cache.errors import TecCacheError
from tec_cache.printable import printable
from tec_cache.urls import scrubbed, without_secrets


class Html(str):
    """Text that is HTML already, and safe."""

    __slots__ = ()


NOTHING = Html("")
MOST_SAID = 240
"""Characters of a problem."""


def text(value: object) -> Html:
    """Return any value as text on the page; a missing one as a dash."""
    if isinstance(value, Html):
        return value
    shown = "–" if value is None or value == "" else str(value)  # noqa: RUF001
    return Html(html.escape(printable(scrubbed(shown)), quote=True))


def place(value: object) -> Html:
    """Return a path or URL as text, with nothing of its credentials."""
    return Html(f"<code>{text(without_secrets(str(value)))}</code>")


def joined(parts: Iterable[Html]) -> Html:
    """Put pieces one after another."""
    return Html("\n".join(part for part in parts if part))


def element(name: str, inner: object, **attributes: object) -> Html:
    """Return an element; class_ and aria_label stand for class and aria-label."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{text(inner)}</{name}>")


def paragraph(*parts: object, kind: str | None = None) -> Html:
    """Return a paragraph of texts and pieces."""
    return element("p", Html("".join(text(part) for part in parts if part != "")), class_=kind)


def heading(level: int, title: object, anchor: str | None = None) -> Html:
    """Return a heading."""
    return element(f"h{level}", title, id=anchor)


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str, numbers: bool = True) -> Html:
    """Return a table whose first column names the rows; empty without rows. numbers: the others are set flush right.

    It scrolls by itself where the page is narrower.
    """
    body = [Html("".join([element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])]))
            for row in rows]  # fmt: skip
    if not body:
        return NOTHING
    top = Html("".join(element("th", cell, scope="col") if cell else Html("<td></td>") for cell in head))
    said = element("caption", caption) + (element("thead", element("tr", top)) if any(head) else "")
    rest = element("tbody", Html("".join(element("tr", row) for row in body)))
    inner = element("table", Html(said + rest), class_="numbers" if numbers else None)
    return Html(f'<div class="wide" tabindex="0" role="region" aria-label="{text(caption)}">{inner}</div>')


def picture(uri: str, alt: object, caption: object = None, *, kind: str | None = None) -> Html:
    """Return a figure with a picture. uri: of `images`; alt: what it shows, for whoever cannot see it."""
    if not uri.startswith("data:image/"):
        raise ValueError("a report embeds its pictures")
    image = Html(f'<img src="{uri}" alt="{text(alt)}">')
    below = NOTHING if caption is None else element("figcaption", caption)
    return element("figure", Html(image + below), class_=kind)


def grid(figures: Iterable[Html], kind: str) -> Html:
    """Set figures side by side, as many as fit. kind: plots, tiles (small pictures), strips, or sets of a
    few that stay side by side."""
    inner = joined(figures)
    return element("div", Html(f"\n{inner}\n"), class_=kind) if inner else NOTHING


def shortened(said: str) -> str:
    """Return the beginning of a long message: some name every photo."""
    return said if len(said) <= MOST_SAID else said[: MOST_SAID - 4].rstrip() + " ..."


def problem(error: TecCacheError | str, where: object = None) -> Html:
    """Say what could not be shown, and why: an error's three parts."""
    if isinstance(error, str):
        lines = [element("strong", error), place(where) if where else NOTHING]
    else:
        details = [element("span", detail) for detail in error.details]
        todo = f"{error.todo}: {error.command}" if error.command else error.todo
        lines = [element("strong", shortened(error.what)), *details, place(error.where) if error.where else NOTHING,
                 text(todo) if todo else NOTHING]  # fmt: skip
    inner = Html("<br>".join(line for line in lines if line))
    return element("p", inner, class_="problem")
