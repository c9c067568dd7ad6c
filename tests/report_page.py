"""A report's page as a test reads it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

_VOID = {"meta", "img", "br", "link", "hr", "input"}
_LINKS = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction", "ping", "cite"}


class Page(HTMLParser):
    """Elements, pictures, texts by section; fails on what is not closed, or not the page's own."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = file.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        """(alt, source)."""
        self.sections: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(self.source)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        assert len(given) == len(attrs)
        assert not [name for name in given if name.startswith("on")]
        if tag not in _VOID:
            self._open.append(tag)
        if "id" in given:
            self.ids.append(given["id"] or "")
        for name in _LINKS & set(given):
            value = given[name] or ""
            assert value.startswith(("data:image/", "#")), value[:80]
            if value.startswith("#"):
                self.targets.append(value[1:])
        if tag == "img":
            self.pictures.append((given.get("alt") or "", given.get("src") or ""))
        if tag == "section":
            self._section = given["id"] or ""
            self.sections[self._section] = ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1:] == [tag], (tag, self._open)
        self._open.pop()
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._section:
            self.sections[self._section] += data
        if self.rows and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells beside the first one, in the first table that has such a row."""
        return next(row[1:] for row in self.rows if row and row[0] == name)

    def alts(self, part: str) -> list[str]:
        return [alt for alt, _ in self.pictures if part in alt]


def decoded(source: str) -> Image.Image | ElementTree.Element:
    """Decode an embedded picture, all of it; an SVG must be well formed and refer to nothing outside."""
    match = re.fullmatch(r"data:image/(svg\+xml|png|jpeg);base64,([A-Za-z0-9+/=]+)", source)
    assert match is not None, source[:60]
    data = base64.b64decode(match[2], validate=True)
    if match[1] != "svg+xml":
        image = Image.open(io.BytesIO(data))
        image.load()
        assert image.format == match[1].upper()
        return image
    root = ElementTree.fromstring(data)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for element in root.iter():
        assert not element.tag.endswith(("script", "foreignObject"))
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            if name.endswith("href"):
                assert value.startswith(("#", "data:image/")), value
            assert not re.search(r"url\((?!#)", value), value
    return root


def require_self_contained(page: Page) -> None:
    """Nothing is fetched and nothing runs; every picture is whole and has its text; every link leads somewhere."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "default-src 'none'" in page.source
    assert not re.search(r"@import|url\(", page.source)
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.targets) <= set(page.ids)
    assert page.pictures
    for alt, source in page.pictures:
        assert alt
        decoded(source)
