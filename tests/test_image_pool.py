"""Image work in processes: the same as in threads, explained when one dies, and nothing of it left afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tec_cache.data.image_pool
import tec_cache.data.image_process
import tec_cache.data.image_work
import tec_cache.device
from pipelines.extract import extract
from tec_cache.cache.pixels import JpegSettings, encode_crop
from tec_cache.data.image_pool import ImagePool
from tec_cache.data.image_process import Bytes, ImageProcess
from tec_cache.data.image_work import Cutting, cut_photos
from tec_cache.data.photos import Photo
from tec_cache.data.views import ViewPlan
from tec_cache.device import default_image_workers, resolve_compute
from tec_cache.errors import TecCacheError
from tests.conftest import encoded, files_below, photo, tiny_config

CUTTING = Cutting("s.tar", ViewPlan(size=32), (0, 2), JpegSettings())
SOON = 60.0
"""Seconds after which a test fails that would hang."""


class Listening(ImageProcess):
    """A process that is waited for: extractions of tests are over before one has begun."""

    started: list[Listening]

    def __init__(self, pixels: Bytes) -> None:
        super().__init__(pixels)
        until(lambda: self.ready)
        self.started.append(self)

    @property
    def pid(self) -> int:
        return self._process.pid


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Listening]:
    """Let all images be worked on in processes, and none in this one; return the processes."""
    monkeypatch.setattr(tec_cache.data.image_pool, "IMAGES_IN_THREADS", 0)
    monkeypatch.setattr(tec_cache.data.image_pool, "ImageProcess", Listening)
    monkeypatch.setattr(Listening, "started", [], raising=False)

    def never(*_: Any) -> None:
        raise AssertionError("image work in the main process")

    monkeypatch.setattr(tec_cache.data.image_work, "cut_photo", never)
    monkeypatch.setattr(tec_cache.data.image_work, "decode_resized", never)
    return Listening.started


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# ---- the same as in threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_change_no_byte(
    coded_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path, processes: list[Listening], workers: int
) -> None:
    config = tiny_config(shards, tmp_path / "c", tiny_base, quality="default", workers=workers)
    assert extract(config).missing == 0
    assert len(processes) == workers
    assert files_below(tmp_path / "c") == files_below(coded_cache)


def bad_photos() -> list[Photo]:
    whole = encoded(photo(1))
    return [
        Photo("whole", whole, 1),
        Photo("gone", b"", None, "it is gone"),
        Photo("text", b"text", None),
        Photo("cut", whole[: len(whole) // 2], None),
        Photo("ü/照", encoded(photo(2), "PNG"), None),
        Photo("noted", whole[:2] + b"\xff\xe1\x00\x12Exif\0\0" + b"x" * 10 + whole[2:], None),
        Photo("empty", b"", None),
    ]


def test_what_is_said_of_photos_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tec_cache.data.image_pool, "IMAGES_IN_THREADS", 0)
    expected = cut_photos(CUTTING, bad_photos())
    assert {bool(seen.cut.problem) for seen in expected} == {True, False}
    assert any(seen.cut.note for seen in expected)
    with ImagePool(1) as pool:
        pool.cut(CUTTING, [bad_photos()[0]]).result()
        until(lambda: pool._processes[0].ready)
        assert pool._processes[0].cut(CUTTING, bad_photos()) == expected


def test_crops_are_decoded_to_their_place(processes: list[Listening], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    crops = [encode_crop(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8), JpegSettings()) for _ in range(9)]
    from tec_cache.cache.pixels import decode_crop, resize

    for side in (32, 17, 40):  # more memory, or less, than a process has seen
        with ImagePool(2) as pool:
            pixels = pool.pixels(12, side)
            for future in [pool.decode(crops[:5], pixels, 3), pool.decode(crops[5:], pixels, 8)]:
                future.result()
            assert np.array_equal(pixels.array[3:12], [resize(decode_crop(crop), side) for crop in crops])
            assert not pixels.array[:3].any()
            more = pool.pixels(40, side)
            pool.decode(crops[:1], more, 39).result()
            assert np.array_equal(more.array[39], pixels.array[3])
    assert processes


def test_a_small_job_starts_no_process(shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a process for so few photos")

    monkeypatch.setattr(tec_cache.data.image_pool, "ImageProcess", never)
    assert extract(tiny_config(shards, tmp_path / "c", tiny_base)).missing == 0


def test_photos_of_others_are_hashed_here(processes: list[Listening]) -> None:
    with ImagePool(1) as pool:
        (seen,) = pool.cut(Cutting("s", ViewPlan(), (), JpegSettings()), [Photo("k", b"abc", None)]).result()
    assert seen.sha256.hex().startswith("ba7816bf")
    assert not processes


def test_where_no_process_can_be_started_threads_do_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tec_cache.data.image_pool, "IMAGES_IN_THREADS", 0)
    for executable in ("", str(tmp_path / "nothing"), "/bin/false"):
        monkeypatch.setattr(tec_cache.data.image_process, "get_executable", lambda name=executable: name)
        with ImagePool(2) as pool:
            expected = cut_photos(CUTTING, bad_photos())
            end = time.monotonic() + SOON
            while pool._possible:
                assert pool.cut(CUTTING, bad_photos()).result() == expected
                assert time.monotonic() < end
            assert pool.cut(CUTTING, bad_photos()).result() == expected


def test_the_process_imports_little() -> None:
    code = "import tec_cache.data.image_process, sys; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "timm", "webdataset", "zarr", "fsspec", "rich", "click", "multiprocessing.pool", "cli"}
    assert sorted(heavy & set(loaded)) == []


def test_memory_for_pixels_is_used_again(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shards, tmp_path / "c", tiny_base, batch_size=4)
    extract(config, fit_only=True)
    asked: list[int] = []
    inner = ImagePool.pixels

    def counted(self: ImagePool, count: int, side: int) -> Any:
        asked.append(count)
        return inner(self, count, side)

    monkeypatch.setattr(ImagePool, "pixels", counted)
    monkeypatch.setattr("pipelines.extraction.base_batches.VIEWS_AHEAD", 8)
    assert extract(config).targets_made > 2 * sum(asked)
    assert len(asked) == 1


# ---- errors, signals and ends ------------------------------------------------------------------------------------


def test_an_error_comes_as_it_was_raised(processes: list[Listening]) -> None:
    with ImagePool(1) as pool:
        pixels = pool.pixels(4, 32)
        with pytest.raises(ValueError, match="JPEG") as error:
            pool.decode([b"no JPEG"], pixels, 0).result()
        assert any("decode_resized" in note for note in error.value.__notes__)
        good = encode_crop(np.zeros((32, 32, 3), np.uint8), JpegSettings())
        pool.decode([good], pixels, 0).result()  # the process goes on
    assert len(processes) == 1


def kill_soon(processes: list[Listening]) -> threading.Thread:
    """Kill the first process as soon as it is there."""

    def kill() -> None:
        until(lambda: bool(processes))
        os.kill(processes[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_a_killed_process_is_explained(processes: list[Listening]) -> None:
    with ImagePool(2) as pool:
        photos = [Photo(f"p{number}", encoded(photo(number)), None) for number in range(4)]
        pool.cut(CUTTING, photos).result()
        os.kill(processes[0].pid, signal.SIGKILL)

        def until_its_thread_has_a_turn() -> None:
            while True:
                for future in [pool.cut(CUTTING, photos) for _ in range(8)]:
                    future.result(SOON)

        with pytest.raises(TecCacheError, match="killed by SIGKILL") as error:
            until_its_thread_has_a_turn()
    assert "'p0' to 'p3'" in error.value.where
    assert "memory" in error.value.todo
    assert all(is_gone(process.pid) for process in processes)


def test_an_extraction_whose_process_was_killed_goes_on(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path, processes: list[Listening],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = tiny_config(shards, tmp_path / "c", tiny_base, workers=2)
    extract(config, fit_only=True)
    processes.clear()
    thread = kill_soon(processes)
    inner = ImageProcess.cut

    def cut(self: ImageProcess, *args: Any) -> Any:
        thread.join()
        return inner(self, *args)

    monkeypatch.setattr(ImageProcess, "cut", cut)
    with pytest.raises(TecCacheError, match="killed by SIGKILL"):
        extract(config)
    assert all(is_gone(process.pid) for process in processes)
    monkeypatch.undo()
    assert extract(config).missing == 0
    assert files_below(tmp_path / "c") == files_below(made_cache)


def test_signals_that_end_a_job_are_for_the_main_process_alone(processes: list[Listening]) -> None:
    photos = [Photo("k", encoded(photo(1)), None)]
    with ImagePool(1) as pool:
        expected = pool.cut(CUTTING, photos).result()
        for number in tec_cache.data.image_process.NOT_ITS_OWN:
            os.kill(processes[0].pid, number)
        assert pool.cut(CUTTING, photos).result(SOON) == expected
    assert not set(tec_cache.data.image_process.NOT_ITS_OWN) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_nothing_is_left(processes: list[Listening]) -> None:
    names, handles = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    with ImagePool(3) as pool:
        pool.pixels(4, 32)
        for future in [pool.cut(CUTTING, bad_photos()) for _ in range(9)]:
            future.result()
    assert len(os.listdir("/proc/self/fd")) == handles
    assert set(os.listdir("/dev/shm")) <= names
    assert all(is_gone(process.pid) for process in processes)  # waited for: no zombie either


def test_processes_leave_when_the_main_one_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "main.py"
    program.write_text(
        textwrap.dedent(
            """
            import time
            from tec_cache.data.image_process import Bytes, ImageProcess
            pixels = Bytes()
            processes = [ImageProcess(pixels) for _ in range(2)]
            while not all(process.ready for process in processes):
                time.sleep(0.01)
            print(*[process._process.pid for process in processes], flush=True)
            time.sleep(600)
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    main = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env=environment)
    assert main.stdout is not None
    with main, main.stdout:
        pids = [int(text) for text in main.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(is_gone, pids))
        main.kill()
    until(lambda: all(is_gone(pid) or _is_zombie(pid) for pid in pids))


def _is_zombie(pid: int) -> bool:
    """Say whether a process has ended and only its new parent, which may be no init, has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# ---- how many, and where -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "device"), [(0, "cuda:0"), (1, "cuda:1"), (2, "cuda:0"), (5, "cuda:1")])
def test_more_processes_than_gpus_take_them_in_turn(monkeypatch: pytest.MonkeyPatch, rank: int, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    used: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: used.append(str(chosen)))
    assert str(resolve_compute("auto", "auto", rank, shared=True).device) == device
    assert str(resolve_compute("cuda", "auto", rank).device) == f"cuda:{rank}"  # a training's processes do not share
    assert used == [device, f"cuda:{rank}"]


@pytest.mark.parametrize(
    ("cores", "processes", "each"), [(16, 1, 16), (16, 4, 4), (2, 4, 1), (128, 1, 32), (128, 2, 32)]
)
def test_processes_divide_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, each: int) -> None:
    monkeypatch.setattr(tec_cache.device, "available_cores", lambda: cores)
    assert default_image_workers(processes) == each
