"""Checkpoints that a thread writes while the training goes on: the same bytes, and what happens when it fails."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import tec_cache.run.checkpoint
import tec_cache.run.saving
from pipelines.train import train
from tec_cache.distributed import Ranks
from tec_cache.errors import TecCacheError
from tec_cache.run.checkpoint import GivenUp, save_checkpoint
from tec_cache.run.layout import checkpoints
from tec_cache.run.loop import Loop
from tec_cache.run.metrics import read_metrics
from tec_cache.run.saving import HostCopy, Saver
from tec_cache.run.stopping import stop_requested
from tests.conftest import tiny_training
from tests.launch import options, torchrun

LONG = 120.0
"""Seconds after which a test gives up waiting for another thread."""


def saved_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoints(run)}


class Delayed:
    """Writes the checkpoint of a step only when the training is two steps further, or is over."""

    def __init__(self, patch: pytest.MonkeyPatch, stop_step: int) -> None:
        self.step, self.stop_step = 0, stop_step
        self.ahead: list[int] = []
        self._moved = threading.Condition()
        step = Loop.train_step

        def counted(loop: Loop[Any], *args: Any, **more: Any) -> None:
            step(loop, *args, **more)
            with self._moved:
                self.step = loop.step
                self._moved.notify_all()

        patch.setattr(Loop, "train_step", counted)
        patch.setattr(tec_cache.run.saving, "save_checkpoint", self.save)

    def save(self, run: Path, identity: str, step: int, state: dict[str, Any], **more: Any) -> Path:
        with self._moved:
            assert self._moved.wait_for(lambda: self.step >= min(step + 2, self.stop_step), LONG)
            self.ahead.append(self.step - step)
        return save_checkpoint(run, identity, step, state, **more)


def test_a_slow_write_leaves_the_bytes_of_the_step_that_was_saved(made_cache: Path, tmp_path: Path) -> None:
    """Steps, that change weights and the optimizer in place, go on meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        delayed = Delayed(patch, 8)
        train(tiny_training(made_cache, tmp_path / "slow", steps=8))
    assert delayed.ahead == [2, 2, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", lambda self, step, state: save_checkpoint(self._run, self._identity, step, state))
        train(tiny_training(made_cache, tmp_path / "waiting", steps=8))
    slow, waiting = saved_bytes(tmp_path / "slow"), saved_bytes(tmp_path / "waiting")
    assert list(slow) == ["step-000000006.pt", "step-000000008.pt"]
    assert slow == waiting


def test_one_checkpoint_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)
    seen: list[float] = []

    def slow(run: Path, identity: str, step: int, state: dict[str, Any], **_: Any) -> None:
        begun.release()
        assert go_on.acquire(timeout=LONG)
        seen.append(float(state["weight"]))

    monkeypatch.setattr(tec_cache.run.saving, "save_checkpoint", slow)
    weight = torch.tensor(1.0)
    with Saver(tmp_path, "run") as saver:
        saver.save(1, {"weight": weight})
        assert begun.acquire(timeout=LONG)
        weight += 1
        second = threading.Thread(target=saver.save, args=(2, {"weight": weight}))
        second.start()
        assert not begun.acquire(timeout=0.2), "the first one is still being written"
        go_on.release()
        second.join(LONG)
        weight += 1
        go_on.release()
    assert seen == [1.0, 2.0], "what was saved, not what came later, and all of it at the end of the block"


def full_disk(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Refuse the checkpoint of a step as a full disk does."""
    write = tec_cache.run.checkpoint.write_durably

    def refusing(path: Path, *args: Any, **more: Any) -> bool:
        if path.stem == f"step-{step:09d}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *args, **more)

    monkeypatch.setattr(tec_cache.run.checkpoint, "write_durably", refusing)


@pytest.mark.parametrize("step", [6, 9])
def test_a_checkpoint_that_cannot_be_written_stops_the_training_with_the_same_error(
    step: int, made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the last one of a training, when there is no step more."""
    config = tiny_training(made_cache, tmp_path / "run", steps=9)
    with monkeypatch.context() as patch:
        full_disk(patch, step)
        with pytest.raises(TecCacheError, match=f"checkpoint of step {step} cannot be written") as error:
            train(config)
    assert error.value.todo == "make room; the same command goes on from the checkpoint before"
    assert list(saved_bytes(tmp_path / "run"))[-1] == f"step-{step - 3:09d}.pt"
    assert train(config).finished


def test_ctrl_c_gives_up_what_is_being_written_and_an_error_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a checkpoint leaves nothing, and the one before it whole."""
    begun, go_on = threading.Event(), threading.Event()
    save = torch.save

    def slow(content: dict[str, Any], stream: Any) -> None:
        begun.set()
        assert go_on.wait(LONG)
        save(content, stream)

    (tmp_path / "checkpoints").mkdir()
    for error, kept in ((KeyboardInterrupt, ["step-000000001.pt"]), (ValueError, None)):
        begun.clear()
        go_on.clear()
        saver = Saver(tmp_path, "run")
        saver.save(1, {"weight": torch.ones(3)})
        saver.wait()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", slow)
            saver.save(2, {"weight": torch.ones(3)})
            assert begun.wait(LONG)
        # the write goes on when it is given up; otherwise a moment later, while the end of the block waits for it
        given_up, late = saver._given_up, LONG if error is KeyboardInterrupt else 0.3
        threading.Thread(target=lambda u=given_up, s=late: (u.wait(s), go_on.set())).start()  # type: ignore[misc]
        with pytest.raises(error), saver:
            raise error
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == (kept or ["step-000000001.pt", "step-000000002.pt"]), "no draft either"


def test_what_is_given_up_has_no_file(tmp_path: Path) -> None:
    with pytest.raises(GivenUp):
        save_checkpoint(tmp_path, "run", 1, {"weight": torch.ones(10)}, given_up=lambda: True)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_copy_keeps_types_and_shapes_and_takes_its_memory_again() -> None:
    state = {"a": {"half": torch.ones(3, 2).bfloat16(), "step": torch.tensor(3.0)}, "empty": torch.zeros(0, 4), "n": 5}
    copies = HostCopy()
    first, arrived = copies.of(state)
    arrived()
    assert first["n"] == 5
    assert first["empty"].shape == (0, 4)
    assert torch.equal(first["a"]["half"], state["a"]["half"])  # type: ignore[index]
    assert first["a"]["step"].shape == ()
    second, _ = copies.of(state)
    assert second["a"]["half"].data_ptr() == first["a"]["half"].data_ptr()
    other, _ = copies.of({"a": {"half": torch.zeros(5)}})
    assert other["a"]["half"].shape == (5,)


def test_a_checkpoint_that_is_due_waits_for_its_minutes(
    made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps are an epoch; the last step is saved whatever the clock says."""
    train(tiny_training(made_cache, tmp_path / "soon", steps=8, save_minutes=10.0))
    assert list(saved_bytes(tmp_path / "soon")) == ["step-000000008.pt"]
    asked: list[int] = []

    def late(self: Loop[Any]) -> bool:
        asked.append(self.step)
        return self.step in (2, 5)  # a look before the third step, and before the sixth

    monkeypatch.setattr(Loop, "late", late)
    train(tiny_training(made_cache, tmp_path / "late", steps=8, save_minutes=10.0))
    assert list(saved_bytes(tmp_path / "late")) == ["step-000000006.pt", "step-000000008.pt"]
    assert asked == list(range(1, 9))


def test_ranks_agree_on_the_minutes_and_forget_what_was_said_before_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them save at the same step, or one would wait for the others for ever."""
    others = torch.zeros(2)

    def all_reduce(numbers: torch.Tensor, **_: Any) -> Any:
        torch.maximum(numbers, others, out=numbers)
        return type("Work", (), {"wait": lambda self: None})()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: object())
    with stop_requested(Ranks(0, 0, 2)) as request:
        others[1] = 1.0  # the other rank's clock says so, ours not yet
        assert request.agreed(late=False, saved=0) == (False, False), "said now, read in the next step"
        assert request.agreed(late=False, saved=0) == (False, True)
        assert request.agreed(late=False, saved=1) == (False, False), "that was before the checkpoint"
        others[1] = 2.0
        request.agreed(late=False, saved=1)
        assert request.agreed(late=False, saved=1) == (False, True)
        others[0] = 1.0
        request.agreed()
        assert request.agreed().stop


@pytest.mark.slow
def test_whether_the_minutes_have_passed_shows_in_no_number(made_cache: Path, tmp_path: Path) -> None:
    """Of two processes, whose sums of losses are averaged where a checkpoint is due, and logged later."""
    for name, minutes in (("all", 0.0), ("last", 60.0)):
        config = tiny_training(made_cache, tmp_path / name, steps=20, log_every=4, save_minutes=minutes)
        job = torchrun(tmp_path / f"{name}-log", 2, "--no-python", "tec-cache", "train", *options(config), "--quiet")
        assert job.process.returncode == 0, job.err
    both = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("all", "last")]
    assert len(both[0]) == 5
    assert both[0] == both[1]
    assert len(checkpoints(tmp_path / "last")) == 1
