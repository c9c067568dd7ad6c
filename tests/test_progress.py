"""Progress: the speed of the last half minute, the time left at that speed, and lines of one's own."""

from __future__ import annotations

import pytest

from tec_cache import progress
from tec_cache.progress import RATE_SECONDS, Progress


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def go(clock: Clock, shown: Progress, *, seconds: int, items: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        shown.advance(items)


def test_the_speed_is_that_of_the_last_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=100_000, noun="images") as shown:
        go(clock, shown, seconds=100, items=50)
        assert shown.rate == pytest.approx(50)
        go(clock, shown, seconds=int(RATE_SECONDS), items=10)
        assert shown.rate == pytest.approx(10), "what it was before has no weight any more"
        assert shown.mean_rate == pytest.approx(5300 / 130)
        go(clock, shown, seconds=15, items=10)
    lines = capsys.readouterr().err.splitlines()
    assert ", 10.0/s, 2 h 37 min left" in lines[-2], "94,550 images at 10 a second"
    assert ", 37.6/s, in 2 min 25 s" in lines[-1], "what was done is told by its mean"


def test_what_an_earlier_call_did_has_no_speed(clock: Clock) -> None:
    with Progress("train", total=1000) as shown:
        shown.start_at(500)
        go(clock, shown, seconds=5, items=4)
        assert shown.rate == pytest.approx(4)


def test_marks_do_not_pile_up(clock: Clock) -> None:
    with Progress("train") as shown:
        for _ in range(10_000):
            clock.now += 0.1
            shown.advance(1)
        assert len(shown._marks) <= RATE_SECONDS + 2
        assert shown.rate == pytest.approx(10)


def test_a_line_of_ones_own(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=10) as shown:
        shown.say("step 1 of 10, loss 1.0\x1b[2J")
    assert capsys.readouterr().err == "train: step 1 of 10, loss 1.0\\x1b[2J\n"
    with Progress("train", total=10, quiet=True) as shown:
        shown.say("nothing")
    assert capsys.readouterr().err == ""
