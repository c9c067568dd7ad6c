"""The pages hold together: links and anchors lead somewhere, the map is whole, messages are the program's own."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tec_cache.printable import plural

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"])
MAPPED = ("pipelines", "tec_cache", "benchmarks")


def prose(page: Path) -> str:
    """Return a page without its blocks of code, in which a hash begins a comment and brackets are no links."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return what GitHub, and the site, call the headings of a page."""
    seen, found = Counter[str](), set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not re.match(r"[a-z]+:", link)]


def broken(page: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    found = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_anchor_is_there(page: Path) -> None:
    assert not broken(page)


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One, two\n\n## One, two\n\n```sh\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#one-two) [b](other.md#one-two-1) [c](https://example.org/x#y) [d](#here)\n\n# Here\n\n"
        "[e](other.md#no-heading) [f](gone.md) [g](#there)\n"
    )
    assert broken(page) == ["other.md#no-heading", "gone.md", "#there"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_menu_of_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = set(re.findall(r"([\w-]+\.md)$", nav, flags=re.MULTILINE))
    made = {"index.md", "contributing.md", "changelog.md", "benchmarks.md"}  # by mkdocs_hooks.py
    assert named == made | {path.name for path in ROOT.glob("docs/*.md")}


class Entry(NamedTuple):
    """One name of the map."""

    path: str
    whole: bool
    """Whether it is a folder that stands for all that lies in it."""


def entries(text: str) -> Iterator[Entry]:
    """Read the map: names of files and folders, what is below a folder being indented by two spaces more."""
    lines = [re.fullmatch(r"( *)(\S+(?: {1,2}\S+)*)(?: {3,}(\S.*))?", line) for line in text.strip("\n").splitlines()]
    assert all(lines), "each line has names, and a description behind three spaces or more"
    parsed = [(len(line[1]) // 2, line[2].split(), line[3]) for line in lines if line]
    above: list[str] = []
    for number, (depth, names, said) in enumerate(parsed):
        below = number + 1 < len(parsed) and parsed[number + 1][0] > depth
        above = above[:depth]
        for name in names:
            assert said or below, f"{name} is not described"
            yield Entry("".join(above) + name, name.endswith("/") and not below)
        if below:
            assert len(names) == 1
            assert names[0].endswith("/")
            above.append(names[0])


def faults(text: str, root: Path) -> list[str]:
    """Return what is named and not there, and what is there and neither named nor in a folder described whole."""
    mapped = list(entries(text))
    gone = [entry.path for entry in mapped if (root / entry.path).is_dir() != entry.path.endswith("/")]
    gone += [entry.path for entry in mapped if not (root / entry.path).exists()]
    named = {entry.path for entry in mapped}
    whole = tuple(entry.path for entry in mapped if entry.whole)
    files = (path.relative_to(root).as_posix() for top in MAPPED for path in sorted(root.glob(f"{top}/**/*.py")))
    left = [p for p in files if p not in named and not p.startswith(whole) and not p.endswith("__init__.py")]
    twice = [path for path, times in Counter(entry.path for entry in mapped).items() if times > 1]
    return sorted({*gone, *left, *twice})


def test_the_map_names_what_exists_and_all_of_it() -> None:
    (text,) = re.findall(r"<!-- map -->\n```\n(.*?)```\n", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    assert not faults(text, ROOT)


def test_a_file_that_the_map_does_not_name_is_noticed(tmp_path: Path) -> None:
    for name in ("pipelines/a.py", "pipelines/parts/b.py", "tec_cache/c.py", "tec_cache/d.py", "tec_cache/all/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = (
        "pipelines/\n  a.py    a\n  parts/\n    b.py   b\ntec_cache/   things\n  c.py  d.py   c and d\n  all/   all\n"
    )
    assert faults(text, tmp_path) == []
    (tmp_path / "pipelines/parts/new.py").touch()
    (tmp_path / "tec_cache/new.py").touch()
    (tmp_path / "tec_cache/all/new.py").touch()
    (tmp_path / "pipelines/a.py").unlink()
    assert faults(text, tmp_path) == ["pipelines/a.py", "pipelines/parts/new.py", "tec_cache/new.py"]


def said_by_the_program() -> tuple[set[str], set[str]]:
    """Return the pieces of text between what differs from case to case, and the nouns that are counted."""
    trees = (ast.parse(path.read_text()) for top in ("pipelines", "tec_cache") for path in ROOT.glob(f"{top}/**/*.py"))
    said, nouns = set(), set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            said.add(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "counted" and len(node.args) == 2:
            nouns.add(ast.literal_eval(node.args[1]))
    return said, nouns


def test_the_messages_of_the_trouble_page_are_the_programs_own() -> None:
    page = (ROOT / "docs/trouble.md").read_text()
    messages = [m for m in re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE) if m != "import timm"]
    assert len(messages) > 40
    said, nouns = said_by_the_program()
    plurals = "|".join(plural(2, noun) for noun in nouns)
    for message in messages:
        message = re.sub(rf"\.\.\. (?:{plurals})\b", "...", message)
        for piece in filter(None, (piece.strip() for piece in message.split("..."))):
            assert any(piece in text for text in said), (message, piece)


def test_the_kubernetes_job_makes_every_part() -> None:
    job = yaml.safe_load((ROOT / "examples/kubernetes-extract.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert f'--part "$((JOB_COMPLETION_INDEX + 1))/{job["spec"]["completions"]}"' in container["args"][0]
    # what Kubernetes asks of a job with backoffLimitPerIndex or podFailurePolicy
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_the_citation_says_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version is not None
    assert citation["version"] == version[1]
    assert version[1] in (ROOT / "CHANGELOG.md").read_text()
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
