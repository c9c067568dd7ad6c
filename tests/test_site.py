"""The site of the documentation as a browser shows it, on a phone and on a desk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.browser import BROWSER, Browser, browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no browser is installed"),
    pytest.mark.skipif(find_spec("mkdocs") is None, reason="make docs has not installed what builds the site"),
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.mark.parametrize("width", [390, 1280])
def test_every_page_fits_and_fetches_nothing(site: Path, shown: Browser, width: int) -> None:
    pages = [page for page in sorted(site.glob("*.html")) if page.stem != "404"]  # which names a server's own paths
    assert len(pages) > 20
    for page in pages:
        found = shown.look(page, width)
        assert found["width"] <= found["inner"], f"{page.name} is wider than the screen"
        assert (found["errors"], found["fetched"], found["broken"], found["silent"]) == ([], [], [], []), page.name
        assert found["headings"] == 1, page.name


def test_what_is_wrong_is_seen(shown: Browser, tmp_path: Path) -> None:
    bad = '<h1>a</h1><div style="width:3000px">b</div><img src="gone.png"><script>throw 1</script>'
    page = tmp_path / "bad.html"
    page.write_text(f'{bad}<img src="http://127.0.0.1:1/x.png" alt="x">')
    found = shown.look(page, 390)
    assert found["width"] > found["inner"]
    assert found["errors"]
    assert found["fetched"] == ["http://127.0.0.1:1/x.png"]
    assert len(found["broken"]) == 2
    assert len(found["silent"]) == 1
