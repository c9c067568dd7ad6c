"""What the site takes from outside docs/: README.md as its first page, other pages of the repository, job files.

All pages are written for whoever reads them in the repository; here their links are turned to where the site has the
same file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""File of the repository -> page of the site; those of docs/ are named as they are."""


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/."""
    for source, page in PAGES.items():
        text = _with_links((ROOT / source).read_text(encoding="utf-8"), posixpath.dirname(source))
        files.append(File.generated(config, page, content=text))
    others = [ROOT / "LICENSE", *sorted(path for path in (ROOT / "examples").iterdir() if path.is_file())]
    for path in others:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page of docs/; the others' were turned when they were added."""
    return markdown if page.file.src_uri in PAGES.values() else _with_links(markdown, "docs")


def _with_links(text: str, folder: str) -> str:
    """Turn relative links of a page in a folder of the repository into the site's, whose pages lie side by side."""

    def turned(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        if not path or re.match(r"[a-z]+:", path):
            return found[0]
        place = posixpath.normpath(posixpath.join(folder, path))
        return f"]({PAGES.get(place, place.removeprefix('docs/'))}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", turned, text)
