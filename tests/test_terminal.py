"""Whoever reads the output may leave, know ASCII only, or press Ctrl-C at any moment: never a traceback."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import cli
import pipelines.info
from pipelines.terminal import streams
from tec_cache.cache.opening import open_cache

ROOT = Path(__file__).parent.parent
SCRIPT = Path(sys.executable).parent / "tec-cache"


def shell(line: str, *words: object, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash; $T is the program, "$@" are the words."""
    command = ["bash", "-c", line, "bash", *map(str, words)]
    return subprocess.run(command, capture_output=True, timeout=300, env=os.environ | {"T": str(SCRIPT)} | env)


def program(words: list[str], before: str = "", **env: str) -> subprocess.Popen[bytes]:
    """Start the program as its script does, with some code of the test before it."""
    code = f"import os, signal, sys, time\nsys.argv = {['tec-cache', *words]!r}\n{before}\nfrom cli import main\nmain()"
    # whoever runs the tests may ignore Ctrl-C, and what it starts would too
    code = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | env
    )


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out.decode(), err.decode()


# ---- closed and full streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ('"$T" info "$1"', 0, ""),
        ('"$T" info "$1" >&-', 0, ""),
        ('"$T" info "$1" 2>&-', 0, ""),
        ('"$T" info "$1" >&- 2>&-', 0, ""),
        ('"$T" info "$1" <&- >&- 2>&-', 0, ""),
        ('"$T" info "$1" > /dev/full', 1, "error: the output cannot be written: No space left on device\n"),
        ('"$T" info "$1" --json > /dev/full 2>&1', 1, ""),
        ('set -o pipefail; (sleep 0.2; "$T" info "$1") | true', 1, ""),
        ('set -o pipefail; (sleep 0.2; "$T" --help) | true', 1, ""),
        ('set -o pipefail; (sleep 0.2; "$T" info "$1" 2>&1) | true', 1, ""),
        ('"$T" info "$1/none" 2>&-', 2, ""),
        ('"$T" info "$1/none" 2> /dev/full', 2, ""),
        ('"$T" info "$1/none" --json > /dev/full', 2, "error: the output cannot be written: No space left on device\n"),
        ('"$T" nonsense 2>&-', 2, ""),
    ],
)
def test_streams_that_take_nothing(made_cache: Path, line: str, code: int, said: str) -> None:
    ran = shell(line, made_cache)
    assert (ran.returncode, ran.stderr.decode()) == (code, said)


def test_an_extraction_whose_reader_has_left_loses_nothing(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Neither its work nor, where standard error was closed, its files: the first one opened would take its number."""
    words = [shards, "--cache", tmp_path / "c", "--base", tiny_base, "--views", 1, "--size", 32, "--grid", 4]
    more = ["--k", 3, "--quality", "exact", "--limit", 20, "--device", "cpu", "--threads", 1, "--workers", 1]
    ran = shell('set -o pipefail; (sleep 0.2; exec "$T" extract "$@" 2>&-) | true', *words, *more)
    assert ran.returncode == 1
    assert ran.stderr == b""
    ran = shell('"$T" verify "$1" --full', tmp_path / "c")
    assert (ran.returncode, ran.stderr.count(b"error")) == (0, 0), ran.stdout


def test_a_closed_number_is_not_given_to_the_next_file(tmp_path: Path) -> None:
    code = "import os\nfrom pipelines.terminal import streams\nstreams.open_missing()\n"
    code += f"descriptor = os.open({str(tmp_path / 'f')!r}, os.O_CREAT | os.O_WRONLY)\n"
    code += "os.write(2, b'a warning of some library')\nos._exit(descriptor)"
    for closed in ("2>&-", ">&-", "<&-", "<&- >&- 2>&-"):
        assert shell(f'cd "$2"; "$1" -c "$3" {closed}', sys.executable, ROOT, code).returncode > 2
        assert (tmp_path / "f").read_bytes() == b""


def test_streams_that_somebody_has_put_there_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    streams.make_tolerant()
    assert (sys.stdout, sys.stderr) == before


def test_a_pipe_that_is_full_and_does_not_block_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stream = streams.Tolerant(writer, "wb", closefd=True)
    size, text = 0, b"x" * 3_000_000
    child = subprocess.Popen([sys.executable, "-c", "import sys; print(len(sys.stdin.buffer.read()))"],
                             stdin=reader, stdout=subprocess.PIPE)  # fmt: skip
    os.close(reader)
    while size < len(text):
        size += stream.write(text[size:])
    stream.close()
    assert int(child.communicate()[0]) == len(text)
    assert stream.lost is None


# ---- encodings -----------------------------------------------------------------------------------------------


ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "ascii:strict"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C.UTF-8"},
]
NAMES = ["caf\u00e9 \u5199\u771f".encode(), b"caf\xe9\xff", b"a\x1b[31m\nb"]


@pytest.mark.parametrize(
    ("name", "env"),
    [  # each name once in the quick tests, all pairs with an encoding in the slow ones
        pytest.param(name, env, marks=() if i == j else pytest.mark.slow)
        for i, env in enumerate(ENCODINGS)
        for j, name in enumerate(NAMES)
    ],
)
def test_any_name_in_any_encoding(made_cache: Path, tmp_path: Path, env: dict[str, str], name: bytes) -> None:
    """A folder's name reaches the output of a result, of an error, of a usage error, and of --json."""
    link = os.fsencode(tmp_path) + b"/" + name
    os.symlink(made_cache, link)
    line = '"$T" info "$(printf "%b" "$1")" && ! "$T" info "$(printf "%b" "$1")/none" && ! "$T" "$(printf "%b" "$1")"'
    escaped = "".join(f"\\x{byte:02x}" for byte in link)
    ran = shell(line, escaped, **env)
    assert ran.returncode == 0, ran.stderr
    for text in (ran.stdout, ran.stderr):
        assert b"Traceback" not in text
        assert not set(text) & (set(range(32)) - {10}), text
    assert ran.stderr.count(b"\n") == 7
    told = shell('"$T" info "$(printf "%b" "$1")" --json', escaped, **env)
    assert os.fsencode(json.loads(told.stdout)["cache"]) == link


# ---- signals -------------------------------------------------------------------------------------------------

AT_IMPORT = """
seen = 0
def interrupt(event, args):
    global seen
    if event == "import" and (seen or args[0] == "click"):  # the first one behind the program's own first lines
        seen += 1
        if seen == {number}:
            os.kill(os.getpid(), signal.{name})
sys.addaudithook(interrupt)
"""


@pytest.mark.parametrize("number", [1, 2, 5, 20, 60, 100, 120])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_anything_is_being_imported(made_cache: Path, number: int, name: str) -> None:
    """`--json info` imports about 250 modules: click, then its own."""
    before = AT_IMPORT.format(number=number, name=name)
    code, out, err = ended(program(["info", str(made_cache)], before))
    assert (code, out) == (130, "")
    assert err.startswith("error: interrupted")
    assert "Traceback" not in err
    code, out, err = ended(program(["info", str(made_cache), "--json"], before))
    assert (code, err) == (130, "")
    assert json.loads(out)["error"]["exit_code"] == 130


def test_only_one_rank_says_that_it_was_interrupted(made_cache: Path) -> None:
    before = AT_IMPORT.format(number=1, name="SIGINT")
    assert ended(program(["info", str(made_cache)], before, RANK="1")) == (130, "", "")


READY = """
def ready(event, args):
    if event == "import" and args[0] == "click":
        os.write(2, b"!")
sys.addaudithook(ready)
"""


@pytest.mark.parametrize("words", [["--help"], ["info", "{cache}"], ["verify", "{cache}", "--full"]])
def test_ctrl_c_at_any_moment(made_cache: Path, words: list[str]) -> None:
    """From the first import to the end of the process, one to three times."""
    draw = random.Random(" ".join(words))
    filled = [word.format(cache=made_cache) for word in words]
    for _ in range(8):
        process = program(filled, READY)
        assert process.stderr is not None
        assert process.stderr.read(1) == b"!"
        for _ in range(draw.randint(1, 3)):
            time.sleep(draw.random() * 0.4)
            process.send_signal(signal.SIGINT)
        code, out, err = ended(process)
        assert code in (0, 130)
        assert "Traceback" not in out + err
        assert "Exception ignored" not in out + err


def test_ctrl_c_in_an_extraction_and_then_the_rest(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["extract", str(shards), "--cache", str(tmp_path / "c"), "--base", str(tiny_base), "--views", "1"]
    words += ["--size", "32", "--grid", "4", "--k", "3", "--quality", "exact", "--device", "cpu", "--group-size", "8"]
    for _ in range(3):
        process = program(words, READY)
        assert process.stderr is not None
        assert process.stderr.read(1) == b"!"
        time.sleep(draw.random() * 6)
        process.send_signal(signal.SIGINT)
        code, out, err = ended(process)
        assert code in (0, 130)
        assert "Traceback" not in out + err
        if code:
            assert "interrupted" in err
    code, _, err = ended(program(words))
    assert code == 0, err
    open_cache(tmp_path / "c").require_complete(1, "tiny")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(30)", "interrupted: what is finished is kept"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", "interrupted: what is finished is kept"),
        # a second time, while what was begun is being finished
        ("\n try: os.kill(os.getpid(), signal.SIGINT); time.sleep(30)"
         "\n finally: os.kill(os.getpid(), signal.SIGINT); time.sleep(30)", "interrupted: what is finished is kept"),
        # in a destructor, out of which no exception comes
        ("\n class D:\n  def __del__(self): os.kill(os.getpid(), signal.SIGINT); time.sleep(30)"
         "\n D(); time.sleep(30)", "interrupted: what is finished is kept"),
    ],
)  # fmt: skip
def test_a_signal_while_a_command_works(work: str, said: str) -> None:
    before = f"import pipelines.info\ndef work(place): {work}\npipelines.info.info = work"
    begin = time.monotonic()
    code, out, err = ended(program(["info", "x y"], before))
    assert time.monotonic() - begin < 30
    assert (code, out) == (130, "")
    assert err.strip().splitlines() == [f"error: {said}", "  to do: go on with", "    tec-cache info 'x y'"]


def test_a_signal_after_the_work_leaves_its_exit_code(made_cache: Path) -> None:
    before = "import atexit\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
    for words, code in ((["--version"], 0), (["info", str(made_cache)], 0), (["info", "nowhere"], 2)):
        assert ended(program(words, before))[0] == code


def test_at_the_very_end_signals_are_ignored() -> None:
    """Python then gives handlers up for the default action, which would replace the exit code."""
    before = "import atexit\natexit.register(lambda: print(signal.getsignal(signal.SIGINT).name))"
    code, out, _ = ended(program(["--version"], before))
    assert (code, out.splitlines()[-1]) == (0, "SIG_IGN")


def test_ctrl_c_stays_ignored_where_the_caller_ignores_it(made_cache: Path) -> None:
    """A script's background job outlives the Ctrl-C of its terminal."""
    before = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + AT_IMPORT.format(number=3, name="SIGINT")
    before += "import atexit\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    code, out, err = ended(program(["info", str(made_cache)], before))
    assert (code, err) == (0, "")
    assert "97 photos" in out


def test_a_program_that_imports_this_one_keeps_its_signals() -> None:
    code = "import signal, sys\nsys.argv = ['train.py']\nbefore = signal.getsignal(signal.SIGINT)\nimport cli\n"
    code += "assert signal.getsignal(signal.SIGINT) is before"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [(EOFError("cut"), "EOFError: cut"), (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
     (ValueError("one\ntwo"), "ValueError: one\n    two\n")],
)  # fmt: skip
def test_an_error_of_the_work_is_not_taken_for_a_signal_or_a_closed_output(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(place: str) -> Any:
        raise error

    monkeypatch.setattr(pipelines.info, "info", fails)
    monkeypatch.setattr(sys, "argv", ["tec-cache", "info", "x"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert said in capsys.readouterr().err
