"""The hour on a GPU, rehearsed: how its parts follow one another, and all of them in a size for a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import running
from benchmarks.gpu.data import Data, made
from benchmarks.gpu.parts import Part, parts_of
from benchmarks.gpu.results import tables
from benchmarks.gpu.sizes import GPU, TINY
from tec_cache.errors import IdentityError

Rows = list[dict[str, Any]]


def fine(data: Data) -> Rows:
    return [{"views/s": 1234.5, "loud": True}]


def broken(data: Data) -> Rows:
    raise MemoryError("no room for 2,048 views")


def aborted(data: Data) -> Rows:
    os._exit(7)


def endless(data: Data) -> Rows:
    time.sleep(600)
    return []


def lasting(data: Data) -> Rows:
    (data.folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
    return []


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let parts run in this process; the names of those that were begun."""
    begun = []

    def here(part: Part, data: Data, seconds: float) -> dict[str, Any] | None:
        begun.append(part.name)
        if part.work is endless:
            return None
        try:
            return {"rows": part.work(data)}
        except MemoryError as error:
            return {"failed": str(error)}

    monkeypatch.setattr(running, "in_a_process", here)
    return begun


def command(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str, **parts: tuple[float, Callable[..., Rows]]) -> int:
    listed = [Part(name, minutes, f"What of {name}?", work) for name, (minutes, work) in parts.items()]
    monkeypatch.setattr(program, "parts_of", lambda size: listed)
    return program.main(["--out", str(out), "--config", "tiny", *more])


def stored(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu.json").read_text())  # type: ignore[no-any-return]


def test_what_is_done_or_has_failed_is_not_done_again(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"a": (0.1, fine), "b": (0.1, broken), "c": (0.1, fine)}
    assert command(monkeypatch, tmp_path, **parts) == 1, "one has failed"
    assert ran == ["a", "b", "c"], "which stops no other"
    assert "failed: b" in capsys.readouterr().out
    found = stored(tmp_path)
    assert found["parts"]["a"]["rows"] == fine(None)  # type: ignore[arg-type]
    assert found["parts"]["b"]["failed"] == "no room for 2,048 views"
    assert found["machine"]["config"] == "tiny"
    assert command(monkeypatch, tmp_path, **parts) == 1
    assert ran == ["a", "b", "c"]
    command(monkeypatch, tmp_path, "--again", **parts)
    assert ran[3:] == ["b"]
    assert command(monkeypatch, tmp_path, "--again", "--only", "c", **parts) == 0
    assert ran[4:] == ["c"]


def test_commands_continue_one_another(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part is begun where its minutes are left; the first one in any case, or it never would be."""
    parts = {"long": (20.0, fine), "other": (9.0, fine), "short": (1.0, fine)}
    command(monkeypatch, tmp_path, "--minutes", "5", **parts)
    assert ran == ["long", "short"]
    assert "left for the same command again: other" in capsys.readouterr().out
    command(monkeypatch, tmp_path, "--minutes", "5", **parts)
    assert ran == ["long", "short", "other"]
    assert "all is done" in capsys.readouterr().out


def test_a_part_that_is_cut_off_gets_a_whole_command_and_then_has_failed(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = {"a": (0.1, fine), "b": (0.1, endless), "c": (0.1, fine)}
    assert command(monkeypatch, tmp_path, **parts) == 0
    assert set(stored(tmp_path)["parts"]) == {"a", "c"}
    assert command(monkeypatch, tmp_path, **parts) == 1
    assert "does not end within" in stored(tmp_path)["parts"]["b"]["failed"]


def test_results_of_two_machines_are_not_mixed(ran: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command(monkeypatch, tmp_path, a=(0.1, fine))
    found = stored(tmp_path)
    found["machine"]["device"] = "NVIDIA X1"
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    with pytest.raises(IdentityError, match="device"):
        command(monkeypatch, tmp_path, a=(0.1, fine), b=(0.1, fine))
    assert stored(tmp_path) == found


def test_a_part_harms_nothing_but_itself(tmp_path: Path) -> None:
    """Real processes: one that raises, one that dies without a word, and one that does not end."""
    data = Data(tmp_path, TINY)
    assert running.in_a_process(Part("a", 1, "", fine), data, 300) == {"rows": fine(data)}
    failed = running.in_a_process(Part("b", 1, "", broken), data, 300)
    assert failed == {"failed": "MemoryError: no room for 2,048 views"}
    assert running.in_a_process(Part("c", 1, "", aborted), data, 300) == {"failed": "its process ended with code 7"}
    assert running.in_a_process(Part("d", 1, "", endless), data, 0.5) is None


def test_a_part_ends_with_the_command_that_began_it(tmp_path: Path) -> None:
    """Else it would go on, on the device that the next command measures."""
    said = tmp_path / "pid"
    code = (
        "from pathlib import Path; from benchmarks.gpu import running; from benchmarks.gpu.data import Data;"
        "from benchmarks.gpu.parts import Part; from benchmarks.gpu.sizes import TINY; from tests import "
        "test_gpu_benchmark as t; running.in_a_process(Part('a', 1, '', t.lasting), Data(Path(sys.argv[1]), TINY), 600)"
    )
    command = subprocess.Popen([sys.executable, "-c", f"import sys; {code}", str(tmp_path)])
    while not said.exists() or not said.read_text():
        assert command.poll() is None
        time.sleep(0.1)
    command.kill()
    command.wait()
    part = Path("/proc", said.read_text())
    for _ in range(600):
        if not part.exists():
            return
        time.sleep(0.1)
    os.kill(int(said.read_text()), signal.SIGKILL)
    pytest.fail("it goes on")


def test_what_a_kill_left_unfinished_is_made_again(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "one").write_text("1")
        raise KeyboardInterrupt

    def whole(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "two").write_text("2")

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "x", half)
    assert [path.name for path in made(tmp_path / "x", whole).iterdir()] == ["two"]
    assert made(tmp_path / "x", half) == tmp_path / "x", "what is there is not made again"


def test_tables_show_what_was_measured_and_what_failed() -> None:
    how = {"question": "Fast?", "command": "python -m benchmarks.gpu", "seconds": 12.3}
    rows = [{"workers": 1, "views/s": 1234.56, "cosine": 0.99991234}, {"workers": 2, "failed": "no | room"}]
    parts = {"loader": how | {"rows": rows}, "memory": how | {"failed": "out of memory"}}
    text = tables({"machine": {"device": "NVIDIA X1", "config": "gpu"}, "parts": parts})
    assert "Machine of every figure below: NVIDIA X1, gpu." in text
    assert "### loader\n\nFast? `python -m benchmarks.gpu`, 12 s\n" in text
    assert "| workers | views/s | cosine | failed |\n| --- | --- | --- | --- |\n" in text
    assert "| 1 | 1,235 | 0.999912 |  |\n| 2 |  |  | no \\| room |\n" in text
    assert "### memory\n\nFast? `python -m benchmarks.gpu`, 12 s\n\nFailed: out of memory" in text


def test_all_parts_take_about_forty_minutes_and_none_more_than_a_command() -> None:
    parts = parts_of(GPU)
    assert len({part.name for part in parts}) == len(parts)
    assert max(part.minutes for part in parts) < 9
    assert 30 < sum(part.minutes for part in parts) < 50


@pytest.mark.slow
def test_all_parts_run_in_their_tiny_form(tmp_path: Path) -> None:
    how = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--config", "tiny", "--minutes", "30"]
    done = subprocess.run(how, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = stored(tmp_path)["parts"]
    assert list(found) == [part.name for part in parts_of(TINY)]
    assert all(part["rows"] for part in found.values())
    assert not [row for part in found.values() for row in part["rows"] if "failed" in row]
    for row in found["fidelity"]["rows"]:
        assert row["gradient cosine"] > 0.999
    (ranks,) = found["two-ranks"]["rows"]
    assert ranks["gradient cosine"] > 0.999999
    assert ranks["norm / norm of one"] == pytest.approx(1, abs=1e-4)
    assert {row["targets"] for row in found["steps-base"]["rows"]} == {"limit", "cached", "online"}
    shown = subprocess.run([*how[:3], "--tables", str(tmp_path / "gpu.json")], capture_output=True, text=True)
    assert all(f"### {part.name}\n" in shown.stdout for part in parts_of(TINY))
