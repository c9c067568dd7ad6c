"""Payloads copied to a local folder: within its bound at all times, fetched once, never believed blindly."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from pipelines.train import train
from tec_cache.cache.layout import digits_of
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.config import TrainConfig, parse_bytes
from tec_cache.errors import CacheError, ConfigError
from tec_cache.loader import Loader
from tec_cache.store.local import LocalStore
from tec_cache.store.stage_folder import StageFolder
from tec_cache.store.staged import StagedStore
from tests import forked
from tests.conftest import codes_of, tiny_training


class Counted(LocalStore):
    """A store that counts what is asked of it, as if it were far away."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: Counter[str] = Counter()
        self.after_read: Callable[[str], None] = lambda name: None

    def read(self, name: str) -> bytes:
        self.asked["read " + name] += 1
        data = super().read(name)
        self.after_read(name)
        return data

    def read_ranges(self, name: str, ranges: Any) -> list[bytes]:
        whole = list(ranges) == [(0, self.size(name))]
        self.asked[("read " if whole else "ranges ") + name] += 1
        data = super().read_ranges(name, ranges)
        self.after_read(name)
        return data


def staged(made_cache: Path, stage: Path, most: int | None = None) -> tuple[Cache, Counted]:
    store = Counted(made_cache)
    return replace(open_cache(made_cache), store=StagedStore(store, stage, most)), store


def held(stage: Path) -> int:
    """Bytes of all copies, unfinished ones too."""
    sizes = []
    for path in stage.iterdir():
        with suppress(FileNotFoundError):  # another thread has just given it its name
            sizes.append(path.stat().st_size if path.name != ".lock" else 0)
    return sum(sizes)


def payload_bytes(made_cache: Path) -> int:
    return sum(p.stat().st_size for p in made_cache.rglob("*") if digits_of(p.name))


def batches(cache: Cache, epochs: int = 1, workers: int = 2) -> list[Any]:
    loader = Loader(cache, cache["tiny"], batch_size=24, pixel_sizes=(32,), workers=workers)
    steps = loader.steps_per_epoch * epochs
    return list(loader.batches(0, steps))


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.pixels[32], b.pixels[32])
        assert codes_of(b)
        assert all(torch.equal(codes_of(a)[name], values) for name, values in codes_of(b).items())
        assert (a.sample_keys == b.sample_keys).all()


def test_batches_are_the_same_and_later_epochs_ask_the_store_for_no_payload(made_cache: Path, tmp_path: Path) -> None:
    cache, store = staged(made_cache, tmp_path / "stage")
    plain = batches(open_cache(made_cache), 2)
    assert_same(batches(cache, 2), plain)
    payloads = Counter({k: n for k, n in store.asked.items() if digits_of(k.rpartition("/")[2])})
    assert set(payloads.values()) == {1}
    assert {k.split()[0] for k in payloads} == {"read"}
    assert len(payloads) == sum(bool(digits_of(p.name)) for p in made_cache.rglob("*"))
    store.asked.clear()
    assert_same(batches(cache, 4), batches(open_cache(made_cache), 4))
    assert not [k for k in store.asked if digits_of(k.rpartition("/")[2])]
    # another run finds them there
    again, store = staged(made_cache, tmp_path / "stage")
    assert_same(batches(again, 2), plain)
    assert not [k for k in store.asked if digits_of(k.rpartition("/")[2])]


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_the_bound_holds_at_every_moment_and_what_does_not_fit_is_read_from_the_store(
    made_cache: Path, tmp_path: Path, share: float
) -> None:
    stage, most, seen, done = tmp_path / "stage", 1 + int(payload_bytes(made_cache) * share), [0], threading.Event()
    cache, store = staged(made_cache, stage, most)
    store.after_read = lambda name: seen.append(held(stage))

    def watch() -> None:
        while not done.is_set():
            try:
                seen.append(held(stage))
            except FileNotFoundError:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert_same(batches(cache, 4), batches(open_cache(made_cache), 4))
    finally:
        done.set()
        watcher.join()
    assert max(seen) <= most
    copies = {p.name for p in stage.iterdir() if digits_of(p.name)}
    if share:
        assert held(stage) > most / 2
    # what has found room stays: it was read once, in all epochs
    asked = {k.rpartition("/")[2]: n for k, n in store.asked.items() if k.startswith("read ")}
    assert all(asked[name] == 1 for name in copies)
    assert not any(k.startswith("ranges ") and k.rpartition("/")[2] in copies for k in store.asked)


def test_copies_of_earlier_runs_make_room_the_longest_unused_first(tmp_path: Path) -> None:
    names = [f"00000{i}.000-v00.{'0123456789abcdef'}.tar" for i in range(5)]
    for number, name in enumerate(names[:3]):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - number, 1000 - number))
    (tmp_path / "theirs.txt").write_bytes(b"y" * 1000)
    (tmp_path / ".tec-cache-stage").touch()
    folder = StageFolder(tmp_path, 35)
    assert folder.open() == 30
    folder.touch(names[1])
    assert folder.add(names[3], 10, lambda stream: stream.write(b"z" * 10))
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == [names[0], names[1], names[3]]
    assert not folder.add(names[4], 30, lambda stream: stream.write(b"w" * 30))
    assert len(list(tmp_path.glob("*.tar"))) == 3, "nothing is removed in vain"
    assert folder.add(names[4], 10, lambda stream: stream.write(b"w" * 10))
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == [names[1], names[3], names[4]]
    assert not folder.add(names[0], 10, lambda stream: stream.write(b"v" * 10)), "all that is left was used by this run"
    assert (tmp_path / "theirs.txt").exists()


def test_a_damaged_copy_is_dropped_and_fetched_again(made_cache: Path, tmp_path: Path) -> None:
    plain = batches(open_cache(made_cache), 2)
    cache, store = staged(made_cache, tmp_path / "stage")
    batches(cache, 2)
    for copy in (tmp_path / "stage").iterdir():
        if digits_of(copy.name):
            data = copy.read_bytes()
            copy.write_bytes(bytes(255 - byte for byte in data) if copy.name.endswith("zip") else data[:600])
    store.asked.clear()
    assert_same(batches(cache, 2), plain)
    assert all(store.asked[k] == 1 for k in store.asked if k.startswith("read ") and digits_of(k.rpartition("/")[2]))
    for path in made_cache.rglob("*"):
        copy = tmp_path / "stage" / path.name
        assert not digits_of(path.name) or copy.read_bytes() == path.read_bytes()


def test_a_disk_that_damages_copies_again_and_again_is_not_used(
    made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = StageFolder.add

    def harm(self: StageFolder, name: str, size: int, content: Callable[[], bytes | None]) -> bool:
        there = add(self, name, size, content)
        (self.folder / name).write_bytes(b"\0" * size)
        return there

    monkeypatch.setattr(StageFolder, "add", harm)
    cache, store = staged(made_cache, tmp_path / "stage")
    assert_same(batches(cache, 1), batches(open_cache(made_cache), 1))
    assert any(k.startswith("ranges ") for k in store.asked)


def test_damage_in_the_store_itself_is_an_error_that_names_the_file_there(made_cache: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(made_cache, tmp_path / "c"))
    record = open_cache(source).views_record(open_cache(source).view_units[0])
    assert record.payload is not None
    path = source / record.payload.name
    data = bytearray(path.read_bytes())
    data[record.offsets[3] + 20] ^= 1
    path.write_bytes(data)
    cache, _ = staged(source, tmp_path / "stage")
    assert len(cache.read_crops(record, [0, 1, 2])) == 3
    with pytest.raises(CacheError, match="is damaged") as error:
        cache.read_crops(record, [2, 3])
    assert error.value.where.startswith(str(path))
    assert not (tmp_path / "stage" / path.name).exists()


def test_a_copy_that_vanishes_is_fetched_again(made_cache: Path, tmp_path: Path) -> None:
    cache, store = staged(made_cache, tmp_path / "stage")
    record = cache.views_record(cache.view_units[0])
    assert record.payload is not None
    first = cache.read_crops(record, [0, 1])
    for _ in range(3):
        (tmp_path / "stage" / Path(record.payload.name).name).unlink()
        assert cache.read_crops(record, [0, 1]) == first
    assert store.asked["read " + record.payload.name] == 4
    assert not store.asked["ranges " + record.payload.name]
    shutil.rmtree(tmp_path / "stage")  # the whole folder: training goes on without it
    assert cache.read_crops(record, [0, 1]) == first


def test_what_a_killed_process_left_unfinished_is_cleared_and_a_living_one_is_waited_for(tmp_path: Path) -> None:
    name = f"000000.000-v00.{'0' * 16}.tar"
    folder = StageFolder(tmp_path, 100)
    folder.open()
    (tmp_path / f".{name}.part").write_bytes(b"x" * 90)
    (tmp_path / ".theirs.part").write_bytes(b"half a download of another program")
    begun, calls = threading.Event(), []

    def content(stream: IO[bytes]) -> int:
        calls.append(1)
        begun.set()
        time.sleep(0.3)
        return stream.write(b"y" * 80)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(folder.add, name, 80, content)
        begun.wait()
        second = pool.submit(StageFolder(tmp_path, 100).add, name, 80, content)
        assert first.result()
        assert second.result()
    assert len(calls) == 1
    assert (tmp_path / name).read_bytes() == b"y" * 80
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".tec-cache-stage", ".theirs.part", name]


def _stage_all(made_cache: Path, stage: Path, most: int, begin: Any, out: Path) -> None:
    cache, store = staged(made_cache, stage, most)
    begin.wait()
    assert_same(batches(cache, 2), batches(open_cache(made_cache), 2))
    assert held(stage) <= most
    out.write_text(str(sum(n for k, n in store.asked.items() if k.startswith("read ") and digits_of(k.split("/")[-1]))))


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_two_processes_share_a_folder(made_cache: Path, tmp_path: Path, share: float) -> None:
    begin, most = forked.barrier(2), int(payload_bytes(made_cache) * share)
    outs = [tmp_path / "a", tmp_path / "b"]
    jobs = [forked.start(_stage_all, made_cache, tmp_path / "stage", most, begin, out) for out in outs]
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert held(tmp_path / "stage") <= most
    fetched = sum(int(out.read_text()) for out in outs)
    assert fetched == sum(bool(digits_of(p.name)) for p in (tmp_path / "stage").iterdir()), "each copy was made once"


def test_training_with_a_stage_gives_the_same_losses(made_cache: Path, tmp_path: Path) -> None:
    stage = {"stage": str(tmp_path / "stage"), "stage_bytes": "100MB"}
    plain = train(tiny_training(made_cache, tmp_path / "plain", steps=4)).losses
    train(tiny_training(made_cache, tmp_path / "run", steps=2, **stage))
    # where it is staged is no part of what a run is: it goes on without
    assert train(tiny_training(made_cache, tmp_path / "run", steps=4)).losses == plain
    assert any(digits_of(p.name) for p in (tmp_path / "stage").iterdir())


def test_a_disk_with_less_room_than_the_bound_says_is_no_error(
    made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache, store = staged(made_cache, tmp_path / "stage")
    assert_same(batches(cache, 1), batches(open_cache(made_cache), 1))
    assert held(tmp_path / "stage") == 0
    assert all(n == 0 for k, n in store.asked.items() if k.startswith("read ") and digits_of(k.rpartition("/")[2]))


def test_a_folder_that_cannot_be_written_is_refused_at_once(made_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be staged") as error:
        train(tiny_training(made_cache, tmp_path / "run", stage=str(tmp_path / "file" / "stage")))
    assert "--stage" in error.value.todo


@pytest.mark.parametrize(
    ("text", "size"),
    [("200GB", 2 * 10**11), ("1.5 tb", 15 * 10**11), ("500MB", 5 * 10**8), ("7", 7), ("12 B", 12), ("3kb", 3000)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 GiB", "0", "1e9", "5 G B", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        TrainConfig(cache="c", out="o", stage="s", stage_bytes=text)


def test_a_bound_without_a_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="not used: --stage-bytes"):
        TrainConfig(cache="c", out="o", stage_bytes="5GB")
