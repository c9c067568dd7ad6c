"""Whatever a name holds, no message moves the cursor, hides a part of itself, or fakes a line of ours."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cli
from pipelines.terminal.texts import merge_text, verify_text
from pipelines.verify import Verdict
from tec_cache.audit.findings import Finding
from tec_cache.audit.ledger import Report
from tec_cache.cache.identity import require_same
from tec_cache.errors import IdentityError, TecCacheError
from tec_cache.printable import block, printable, shell_words
from tec_cache.progress import Progress

ROOT = Path(__file__).parent.parent
ANY = st.text(st.characters(categories=None), max_size=30)  # with controls and lone surrogates
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
EVIL = "a\x1b[2J\r\nerror: fine\n  to do: rm\x9b1m\u202e\udce9\u2028"


def hidden(text: str) -> set[str]:
    """Characters that a terminal does not show as themselves, but for line breaks."""
    return {c for c in text if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c != "\n") or c in BIDI}


@settings(derandomize=True, max_examples=200, deadline=None)
@given(ANY)
@example(EVIL)
def test_any_text_becomes_one_line_that_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert not hidden(shown)
    assert "\n" not in shown
    shown.encode()
    assert printable(shown) == shown
    kept = "".join(c for c in text if not hidden(c) and c != "\n")
    assert kept == text or shown != text
    assert printable(kept) == kept


@pytest.mark.parametrize(
    "text", ["plain", "Straße/naïve.jpg", "写真/猫.jpg", "👩\u200d👩\u200d👧.png", "a b\\c", "שלום"]
)
def test_ordinary_names_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


@settings(derandomize=True, max_examples=100, deadline=None)
@given(ANY, ANY, ANY, st.lists(ANY, max_size=2), ANY)
@example(EVIL, EVIL, EVIL, [EVIL], EVIL)
def test_an_error_has_the_lines_that_we_wrote_and_no_other(
    what: str, where: str, todo: str, details: list[str], command: str
) -> None:
    error = TecCacheError(what, where=where, todo=todo, details=details, command=command)
    lines = str(error).split("\n")
    assert len(lines) == 1 + len(details) + bool(where) + bool(todo) + bool(command)
    assert not hidden(str(error))
    str(error).encode()
    assert (error.what, error.where, error.todo) == (what, where, todo), "what is stored is not changed"


def test_differences_of_identities_cannot_fake_a_line() -> None:
    stored, asked = {"a": EVIL, EVIL: 1, "n": [{"x": "\x85"}]}, {"a": "b", EVIL: 2, "n": [{"x": "y"}]}
    with pytest.raises(IdentityError) as error:
        require_same(stored, asked, what=f"the set {EVIL!r}", where=EVIL, todo="mend it")
    lines = str(error.value).split("\n")
    assert len(lines) == 1 + 3 + 2
    assert [line[:4] for line in lines[1:4]] == ["    "] * 3
    assert not hidden(str(error.value))


def test_the_json_of_an_error_is_one_line_of_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tec-cache", "info", EVIL, "--json"])
    descriptor, text = cli.report(TecCacheError(EVIL, where=EVIL, details=[EVIL], command=EVIL))
    assert descriptor == 1
    assert text.isascii()
    assert text.count("\n") == 1
    assert json.loads(text)["error"] == {
        "what": f"{EVIL}\n    {EVIL}", "where": EVIL, "todo": f"\n  {EVIL}", "exit_code": 1,
    }  # fmt: skip


def test_results_keep_names_within_their_lines() -> None:
    finding = Finding("record", EVIL, EVIL, EVIL, EVIL)
    text = verify_text(Verdict(EVIL, Report(), [finding], next=[EVIL]), full=False)
    plain = verify_text(Verdict("x", Report(), [Finding("record", "x", "x", "x", "x")], next=["x"]), full=False)
    assert not hidden(text)
    assert text.count("\n") == plain.count("\n")

    class Merged:
        out, fingerprint, views_copied, targets_copied, bytes, already_there = EVIL, "f", 1, 1, 1, 1
        different = (EVIL, EVIL)

    assert not hidden(merge_text(Merged()))  # type: ignore[arg-type]
    assert merge_text(Merged()).count("\n") == 6  # type: ignore[arg-type]


def test_progress_keeps_names_within_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(f"features of {EVIL}") as progress:
        progress.advance(1, note=EVIL)
    said = capsys.readouterr().err
    assert not hidden(said)
    assert said.count("\n") == 1


def test_lines_are_joined_by_nothing_else() -> None:
    assert block(["a\nb", "c\x1b"]) == "a\\nb\nc\\x1b"


@pytest.mark.parametrize(
    "words", [["a b", "c'd"], ["caf\udce9", "\x1b[31m"], ["x\ny", "it's \\ \udcff"], ["~", "$HOME", "*"], ["写真", ""]]
)
def test_a_command_that_is_printed_means_the_same_words_to_a_shell(words: list[str]) -> None:
    line = shell_words(words)
    assert printable(line) == line
    told = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, env={"LC_ALL": "C"}
    ).stdout
    assert told.split(b"\0")[:-1] == [word.encode("utf-8", "surrogateescape") for word in words]
    if all(word.isascii() for word in words) and "\n" not in "".join(words):
        assert "$'" in line or shlex.split(line) == words


def test_no_message_of_ours_is_written_with_a_line_break_in_it() -> None:
    """It would be escaped: further lines are `details`, a command to type is `command`."""
    wrong = []
    for folder in ("tec_cache", "pipelines"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
                    parts = [*node.args[:1], *(k.value for k in node.keywords if k.arg in ("where", "todo"))]
                    texts = [c.value for part in parts for c in ast.walk(part) if isinstance(c, ast.Constant)]
                    wrong += [f"{path.name}:{node.lineno}" for text in texts if isinstance(text, str) and "\n" in text]
    assert not wrong
