"""Stage one's stages: they overlap, memory is bounded, an error in any stops all, and threads change no byte."""

from __future__ import annotations

import _thread
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pipelines.extraction.make_targets
import pipelines.extraction.make_views
import tec_cache.data.image_work
from pipelines.extract import extract
from pipelines.extraction.base_batches import targets_of
from pipelines.extraction.storage import Needed
from pipelines.extraction.tally import WRITERS, Tally, bottleneck_text
from pipelines.verify import verify
from tec_cache.base.model import FrozenBase
from tec_cache.busy import TimedPool
from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.writer import TargetArrays
from tec_cache.codec.fp16 import Float16Codec
from tec_cache.data.tars import TarShard
from tec_cache.device import Compute
from tec_cache.errors import NonFiniteError
from tec_cache.progress import Progress
from tec_cache.types import Targets
from tests.conftest import files_below, tiny_config

SOON = 60.0
"""Seconds after which a test fails that would hang."""


def before(patch: pytest.MonkeyPatch, owner: Any, name: str, then: Callable[[int], None]) -> None:
    """Let `then` be called, with the number of the call from 1, before each call of a function."""
    inner, lock, calls = getattr(owner, name), threading.Lock(), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            calls[0] += 1
            number = calls[0]
        then(number)
        return inner(*args, **kwargs)

    patch.setattr(owner, name, call)


def expect(event: threading.Event) -> None:
    assert event.wait(SOON), "the stages do not overlap"


# ---- overlap: each test ends only if one stage goes on while another one is held ------------------------------


def test_the_base_works_before_all_photos_are_cut(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shards, tmp_path / "c", tiny_base)
    extract(config, fit_only=True)
    works = threading.Event()
    before(monkeypatch, FrozenBase, "forward", lambda _: works.set())
    # more photos than can be begun and waiting before the first unit is with the base
    before(monkeypatch, tec_cache.data.image_work, "cut_photo", lambda n: expect(works) if n > 80 else None)
    assert extract(config).missing == 0


def test_photos_are_cut_while_the_base_works(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shards, tmp_path / "c", tiny_base)
    extract(config, fit_only=True)
    second_group = threading.Event()
    before(monkeypatch, tec_cache.data.image_work, "cut_photo", lambda n: second_group.set() if n > 16 else None)
    before(monkeypatch, FrozenBase, "forward", lambda n: expect(second_group) if n == 1 else None)
    assert extract(config).missing == 0


def test_the_next_unit_is_decoded_while_the_base_works_on_the_last_batch_of_one(
    made_cache: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: Path
) -> None:
    cache = tmp_path / "c"
    extract(tiny_config(shards, cache, None, views_only=True, group_size=8))
    extract(tiny_config(None, cache, tiny_base), fit_only=True)
    next_unit = threading.Event()
    # batches of 8 crops: the ninth is of the next unit
    before(monkeypatch, tec_cache.data.image_work, "decode_resized", lambda n: next_unit.set() if n == 9 else None)
    before(monkeypatch, FrozenBase, "forward", lambda n: expect(next_unit) if n == 1 else None)
    assert extract(tiny_config(None, cache, tiny_base)).missing == 0


@pytest.mark.parametrize(
    ("owner", "name"), [(Float16Codec, "encode"), (pipelines.extraction.make_targets, "commit_targets")]
)
def test_the_base_works_while_targets_are_coded_and_written(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    cache = tmp_path / "c"
    extract(tiny_config(shards, cache, None, views_only=True))
    extract(tiny_config(None, cache, tiny_base), fit_only=True)
    third_batch = threading.Event()
    # units of two batches: the third one is of another unit than the first that is written
    before(monkeypatch, FrozenBase, "forward", lambda n: third_batch.set() if n == 3 else None)
    before(monkeypatch, owner, name, lambda n: expect(third_batch) if n == 1 else None)
    assert extract(tiny_config(None, cache, tiny_base)).missing == 0


# ---- bounds --------------------------------------------------------------------------------------------------


def test_few_units_of_targets_are_in_memory(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, held, most = threading.Lock(), [0], [0]

    def count(more: int) -> Callable[[int], None]:
        def change(_: int) -> None:
            with lock:
                held[0] += more
                most[0] = max(most[0], held[0])

        return change

    before(monkeypatch, TargetArrays, "__post_init__", count(1))
    real = pipelines.extraction.make_targets.commit_targets

    def commit(*args: Any) -> Any:
        record = real(*args)
        count(-1)(0)
        return record

    monkeypatch.setattr(pipelines.extraction.make_targets, "commit_targets", commit)
    assert extract(tiny_config(shards, tmp_path / "c", tiny_base, group_size=4)).targets_made == 194
    assert held[0] == 0
    assert 1 <= most[0] <= WRITERS + 1


# ---- errors and Ctrl-C ---------------------------------------------------------------------------------------


class Failed(Exception):
    """The error of a stage."""


STAGES = {
    "cutting": (tec_cache.data.image_work, "cut_photo", 30),
    "writing crops": (pipelines.extraction.make_views, "commit_views", 4),
    "decoding": (tec_cache.data.image_work, "decode_resized", 30),
    "base": (FrozenBase, "forward", 4),
    "coding": (Float16Codec, "encode", 4),
    "writing targets": (pipelines.extraction.make_targets, "commit_targets", 3),
    "reading": (TarShard, "photos", 2),
}


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell that starts tests in the background lets them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("how", ["error", "Ctrl-C"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_stops_one_stage_stops_all_and_loses_nothing(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str,
    how: str,
) -> None:  # fmt: skip
    config = tiny_config(shards, tmp_path / "c", tiny_base)
    extract(config, fit_only=True)
    owner, name, number = STAGES[stage]

    def stop(call: int) -> None:
        if call == number:
            if how == "error":
                raise Failed(stage)
            _thread.interrupt_main()  # as a signal that comes while this stage works

    threads = set(threading.enumerate())
    with monkeypatch.context() as patch:
        before(patch, owner, name, stop)
        with pytest.raises(Failed if how == "error" else KeyboardInterrupt, match=stage if how == "error" else None):
            extract(config)
    assert set(threading.enumerate()) <= threads, "nothing goes on"
    verdict = verify(str(tmp_path / "c"), full=True)
    assert not [finding for finding in verdict.to_json()["findings"] if "missing" not in str(finding)]
    assert extract(config).missing == 0
    assert files_below(tmp_path / "c") == files_below(made_cache)


def test_what_is_not_finite_is_never_committed_though_the_base_is_ahead(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is behind the base, which has begun other units by then."""
    config = tiny_config(shards, tmp_path / "c", tiny_base, quality="default", fit_views=16)
    extract(config, fit_only=True)
    real, calls, spoiled = pipelines.extraction.make_targets.targets_of, Counter[str](), 5

    def spoil(*args: Any) -> Any:
        targets = real(*args)
        calls["base"] += 1
        if calls["base"] == spoiled:
            targets.attention[1, 0, 0, 0] = float("inf")
        return targets

    monkeypatch.setattr(pipelines.extraction.make_targets, "targets_of", spoil)
    with pytest.raises(NonFiniteError, match=r"not finite for 'p\d+'") as error:
        extract(config)
    assert "unit 0000" in error.value.where
    unit = error.value.where.removeprefix("unit ")
    assert not (tmp_path / "c" / layout.target_record("tiny", Unit.parse(unit))).exists()


# ---- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 5])
def test_the_number_of_threads_that_decode_changes_no_byte(
    coded_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path, workers: int
) -> None:
    extract(tiny_config(shards, tmp_path / "c", tiny_base, quality="default", workers=workers))
    assert files_below(tmp_path / "c") == files_below(coded_cache)


def test_targets_are_coded_with_the_threads_of_the_target_set(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has its number of threads in each thread; the last bits depend on it."""
    seen = set()
    before(monkeypatch, Float16Codec, "encode", lambda _: seen.add(torch.get_num_threads()))
    before(monkeypatch, FrozenBase, "forward", lambda _: seen.add(torch.get_num_threads()))
    extract(tiny_config(shards, tmp_path / "c", tiny_base, threads=3, limit=20))
    assert seen == {3}


# ---- progress ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ({"decoding photos": 0.97, "the base": 0.65, "coding": 0.1, "writing targets": 0.2},
         "decoding photos is the bottleneck (the base waited 35 % of the time)"),
        ({"decoding photos": 0.5, "the base": 0.99, "coding": 0.1},
         "the base is the bottleneck (it waited 1 % of the time)"),
        ({"decoding photos": 0.5, "the base": 0.6, "coding": 0.1, "writing targets": 0.9},
         "coding and writing is the bottleneck (the base waited 40 % of the time)"),
        ({"reading photos": 0.9, "decoding photos": 0.8, "writing crops": 0.1}, "reading photos is the bottleneck"),
    ],
)  # fmt: skip
def test_the_line_names_the_bottleneck(shares: dict[str, float], text: str) -> None:
    assert bottleneck_text(shares) == text


def test_one_line_for_crops_and_targets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of targets to come follows from the part of the source that was read."""
    monkeypatch.setattr("tec_cache.progress.LINE_SECONDS", 0.0)
    needed = Needed()
    needed.source_left, needed.most_per_target = 1000.0, 100
    with TimedPool(1, "test") as pool, Progress("targets mae") as progress:
        tally = Tally(progress, needed, pool, targets=True)
        tally.cut(250.0, 20, 5000)
        tally.coded(10)
        assert needed.bytes_by_stage == {"views": 15_000.0, "targets": 80 * 100.0}
        tally.coded(10)
        tally.written(20, 1000)
        assert needed.bytes_by_stage == {"views": 15_000.0, "targets": 60 * 50.0}
        tally.cut(750.0, 60, 15_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("targets mae: 10/~80 views, ")
    assert " left, 5.0 KB, 20 crops cut" in lines[1]
    assert lines[1].endswith("cut") or "is the bottleneck" in lines[1]
    assert "20/80 views" in lines[-1]


class Doubled:
    """A base whose features are its pixels, two tokens of each image."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __call__(self, images: torch.Tensor) -> Targets:
        return Targets(images.flatten(1).view(len(images), 2, -1))


def test_pixels_may_be_decoded_over_as_soon_as_the_base_was_given_them() -> None:
    """Places of batches are used again: what is queued for a device must not read them later."""
    compute, spec = Compute(torch.device("cpu"), "float32"), SimpleNamespace(normalization="none")
    job: Any = SimpleNamespace(compute=compute, base=Doubled(), spec=spec)
    pixels = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    made = targets_of(job, pixels)
    before = made.features.clone()
    assert before.max() > 0
    pixels.zero_()
    assert torch.equal(made.features, before)
