"""Stages in threads: they overlap, their queues are bounded, the first error stops all, nothing hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tec_cache.background import Stages, in_order
from tec_cache.busy import Busy, TimedPool, bottleneck

SOON = 30.0
"""Seconds after which a test fails that would hang."""


def running() -> set[threading.Thread]:
    return set(threading.enumerate())


def test_all_items_come_in_order_through_several_stages() -> None:
    with Stages() as stages:
        doubled = stages.ahead((2 * i for i in stages.ahead(range(100), 3)), 2)
        assert list(doubled) == list(range(0, 200, 2))


def test_a_stage_works_while_its_consumer_does() -> None:
    """The second item is made before the first one is given back: one after the other they would never meet."""
    meet = threading.Barrier(2, timeout=SOON)

    def items() -> Iterator[int]:
        yield 1
        meet.wait()
        yield 2

    with Stages() as stages:
        for item in stages.ahead(items(), 1):
            if item == 1:
                meet.wait()


def test_a_stage_is_never_further_ahead_than_its_bound() -> None:
    taken, made = [0], [0]
    most = []

    def items() -> Iterator[int]:
        for i in range(50):
            made[0] += 1
            most.append(made[0] - taken[0])
            yield i

    with Stages() as stages:
        for _ in stages.ahead(items(), 3):
            taken[0] += 1
    # three waiting, one in work, and one that was taken out but not counted yet
    assert max(most) <= 5


class Failed(Exception):
    """The error of a stage."""


@pytest.mark.parametrize("error", [Failed, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["first", "second", "body", "behind"])
def test_an_error_anywhere_stops_all_and_is_the_one_that_is_seen(where: str, error: type[BaseException]) -> None:
    before, ended = running(), []

    def failing(name: str, items: Any) -> Iterator[int]:
        try:
            for item in items:
                if name == where and item == 5:
                    raise error(where)
                yield item
        finally:
            ended.append(name)

    def endless() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    def run() -> None:
        with Stages() as stages:
            first = stages.ahead(failing("first", endless()), 2)
            second = stages.ahead(failing("second", first), 2)
            channel = stages.channel(1)
            stages.start(lambda: list(failing("behind", channel)))
            for item in failing("body", second):
                channel.put(item)

    with pytest.raises(error, match=where):
        run()
    assert running() == before, "no thread is left"
    assert len(ended) >= 3


def test_a_stage_between_its_queues_learns_of_an_error() -> None:
    waiting = threading.Event()

    def busy(stages: Stages) -> None:
        waiting.set()
        while True:
            stages.check()

    def run() -> None:
        with Stages() as stages:
            stages.start(busy, stages)
            assert waiting.wait(SOON)
            raise Failed

    with pytest.raises(Failed):
        run()


def test_several_consumers_share_a_channel_and_all_see_its_end() -> None:
    found: list[int] = []
    with Stages() as stages:
        channel = stages.channel(2)
        for _ in range(3):
            stages.start(lambda: found.extend(channel))
        for item in range(30):
            channel.put(item)
        channel.end()
    assert sorted(found) == list(range(30))


def test_work_in_a_pool_comes_in_order_and_is_bounded() -> None:
    begun, most = [0], [0]

    def items() -> Iterator[int]:
        for item in range(40):
            begun[0] += 1
            most[0] = max(most[0], begun[0])
            yield item

    with ThreadPoolExecutor(4) as pool:
        found = []
        for result in in_order(pool, lambda item: item * item, items(), 6):
            begun[0] -= 1
            found.append(result)
    assert found == [item * item for item in range(40)]
    assert most[0] <= 7


def test_work_in_a_pool_is_given_up_with_its_iterator() -> None:
    go, done = threading.Event(), []

    def work(item: int) -> int:
        if item:
            go.wait(SOON)
            done.append(item)
        return item

    with ThreadPoolExecutor(1) as pool:
        results = in_order(pool, work, range(100), 10)
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
        go.set()
    assert len(done) <= 1, "only what was running"


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ({}, ""),
        ({"photos": 0.9, "writing": 0.2}, "photos is the bottleneck"),
        ({"photos": 0.97, "the base": 0.65}, "photos is the bottleneck (the base waited 35 % of the time)"),
        ({"photos": 0.4, "the base": 0.98}, "the base is the bottleneck (it waited 2 % of the time)"),
        (
            {"photos": 0.4, "the base": 0.5, "writing": 0.8},
            "writing is the bottleneck (the base waited 50 % of the time)",
        ),
    ],
)
def test_the_bottleneck_is_the_stage_that_waits_least(shares: dict[str, float], text: str) -> None:
    assert bottleneck(shares, "the base") == text


def test_shares_are_those_of_the_time_and_of_all_threads_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("tec_cache.busy.time.perf_counter", lambda: clock[0])
    busy = Busy({"wide": 4})

    def items() -> Iterator[int]:
        clock[0] += 2.0
        yield 1
        clock[0] += 1.0

    for _ in busy.each("made", items()):
        clock[0] += 3.0  # by the consumer
    with busy.at("wide"):
        clock[0] += 4.0
    busy.add("wide", 12.0)
    assert busy.seconds == 10.0
    assert busy.shares == {"made": 0.3, "wide": 0.4}


def test_a_pool_tells_the_seconds_of_its_tasks() -> None:
    told: list[float] = []
    with TimedPool(1, "test") as pool:
        pool.watch = told.append
        assert list(pool.map(abs, [-1, 2])) == [1, 2]
        with pytest.raises(TypeError):
            pool.submit(abs, "x").result()
    assert len(told) == 3
