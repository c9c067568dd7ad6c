"""Names of files and folders are written once: those of a cache in cache/layout.py, those of a run in run/layout.py.

What counts is a piece of text without a space, as every name is, that is no key of a dictionary.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("tec_cache/**/*.py"), *ROOT.glob("pipelines/**/*.py"), ROOT / "cli.py"])
OTHERS = ("tec_cache/base/", "tec_cache/weights/", "tec_cache/formats/")
"""They read and write folders as other libraries have them."""

CACHE = "tec_cache/cache/layout.py"
PLACES: dict[str, tuple[str, ...]] = {
    r"(^|/)(cache|pack|target|codec|content)\.json|(^|/)records(/|$)|\.idx|\.drafts|\.tec-cache-plan": (CACHE,),
    r"(^|/)c/|zarr\.json|^/?(views|targets|samples|index)/": (CACHE,),
    r"^\.lock$": (CACHE, "tec_cache/store/stage_folder.py"),
    r"metrics\.jsonl|^checkpoints$|^tensorboard$|^step-": ("tec_cache/run/layout.py",),
    r"run\.json|rounds\.json|adapters\.safetensors|^README": ("tec_cache/kinds.py",),
    r"(^|/)config\.json$|^model\.safetensors$": ("tec_cache/kinds.py", *OTHERS),
    r"\.tmp$": ("tec_cache/store/files.py",),
}
"""Names -> where alone they may be written."""


def written(source: str) -> Iterator[str]:
    """Give all texts of a program that could be names: neither docstrings, nor keys, nor names of threads."""
    tree, passed = ast.parse(source), set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            passed.add(node.slice)
        elif isinstance(node, ast.Expr) or (isinstance(node, ast.keyword) and node.arg == "thread_name_prefix"):
            passed.add(node.value)
        elif isinstance(node, ast.Dict):  # a key with a dot is a file's name
            passed |= {key for key in node.keys if isinstance(key, ast.Constant) and "." not in str(key.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in passed:
            text = node.value.decode("latin1") if isinstance(node.value, bytes) else node.value
            if isinstance(text, str) and not re.search(r"\s", text):
                yield text.replace("\\.", ".")  # a pattern of names


def strangers(name: str, source: str) -> list[str]:
    """List the names that a file writes and has no business to."""
    return [
        text
        for text in written(source)
        for pattern, places in PLACES.items()
        if re.search(pattern, text) and not name.startswith(places)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_name_on_disk_is_written_in_one_place(path: Path) -> None:
    assert strangers(str(path.relative_to(ROOT)), path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ['store.names("records")', 'f"targets/{name}/target.json"', 'open(folder / ".lock")', 'run / "checkpoints"',
     'x = {"pack.json": 1}', 'out / "adapters" / "adapters.safetensors"', 'root / ".drafts"', 'f"{array}/c/0"',
     "re.compile(r'step-(\\d+)\\.pt')", 'f(f".{name}.tmp")', 'place / "run.json"'],
)  # fmt: skip
def test_a_name_elsewhere_is_seen(source: str) -> None:
    assert strangers("pipelines/new.py", source)


@pytest.mark.parametrize(
    "source",
    ['"""cache.json of a cache."""', 'raise ConfigError("restore cache.json from a copy")', 'about["records"]',
     'x = {"checkpoints": 3}', 'ThreadPoolExecutor(4, thread_name_prefix="records")', 'x = "views"'],
)  # fmt: skip
def test_words_about_names_may_stand_anywhere(source: str) -> None:
    assert not strangers("pipelines/new.py", source)


def test_every_place_writes_what_it_is_the_place_of() -> None:
    texts = {str(path.relative_to(ROOT)): list(written(path.read_text())) for path in FILES}
    for pattern, places in PLACES.items():
        own = [text for name in texts if name.startswith(places) for text in texts[name]]
        assert any(re.search(pattern, text) for text in own), pattern
