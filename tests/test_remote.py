"""A cache behind a URL: the same bytes as on a disk, one winner for each record, and errors that can be read."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.extract import extract
from pipelines.info import info
from pipelines.train import train
from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import ViewsRecord
from tec_cache.cache.writer import Crop, commit_views
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, StorageError, TecCacheError
from tec_cache.loader import Loader
from tec_cache.store import Store, open_store
from tec_cache.store import drafts as drafts_module
from tec_cache.store.drafts import PREFIX, clear_abandoned, temporary_file
from tec_cache.store.remote import GAP, RemoteStore, near_ranges
from tests import forked
from tests.conftest import files_below, tiny_config, tiny_training
from tests.s3_server import S3Server, closed_port, s3_server

NUMBERS = iter(range(10**6))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3")) as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.create_bucket("bucket")
        yield server


@pytest.fixture(scope="session")
def s3_cache(s3: S3Server, shards: Path, tiny_base: Path) -> str:
    """The cache of `made_cache`, extracted to a bucket."""
    url = "s3://bucket/made"
    extract(tiny_config(shards, url, tiny_base))  # type: ignore[arg-type]
    return url


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "store")
    if request.param == "memory":
        return open_store(f"memory://store-{next(NUMBERS)}")
    request.getfixturevalue("s3")
    return open_store(f"s3://bucket/store-{next(NUMBERS)}")


def objects(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {name: store.read(name) for name in store.names("")}


def without_lock(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_below(folder).items() if name != ".lock"}


def test_every_store_keeps_the_contract(store: Store) -> None:
    assert store.size("a/b.json") is None
    assert store.names("") == store.names("a") == []
    with pytest.raises(FileNotFoundError):
        store.read("a/b.json")
    with pytest.raises(FileNotFoundError):
        store.read_ranges("a/b.json", [(0, 3)])
    with store.draft() as draft:
        draft.write_bytes(b"0123456789")
        store.put(draft, "a/b.bin")
    assert not draft.exists()
    assert (store.size("a/b.bin"), store.read("a/b.bin")) == (10, b"0123456789")
    assert store.read_ranges("a/b.bin", [(7, 2), (0, 3), (8, 9), (20, 5), (3, 0)]) == [b"78", b"012", b"89", b"", b""]
    assert store.create("a/c/d.json", b"first")
    assert not store.create("a/c/d.json", b"second")
    assert store.read("a/c/d.json") == b"first"
    store.create(".hidden", b"")
    assert store.read(".hidden") == b""
    assert store.names("") == ["a/b.bin", "a/c/d.json"]
    assert store.names("a/c") == ["a/c/d.json"]
    store.require_conditional_create()
    assert store.names("") == ["a/b.bin", "a/c/d.json"]
    store.remove("a/b.bin")
    store.remove("a/b.bin")
    assert store.names("") == ["a/c/d.json"]


def test_a_cache_on_s3_holds_byte_for_byte_the_files_of_a_local_one(s3_cache: str, made_cache: Path) -> None:
    assert objects(s3_cache) == without_lock(made_cache)
    remote, local = info(s3_cache), info(str(made_cache))
    assert remote | {"cache": ""} == local | {"cache": ""}


def test_several_sets_from_s3_give_the_losses_of_a_disk_and_one_range_of_each_file_a_block(
    s3_cache: str, s3: S3Server, made_cache: Path, tiny_base: Path, tmp_path: Path
) -> None:
    local, url = Path(shutil.copytree(made_cache, tmp_path / "cache")), "s3://bucket/two-sets"
    for place in (str(local), url):
        if place == url:
            for name, data in objects(s3_cache).items():
                open_store(url).create(name, data)
        extract(tiny_config(None, place, tiny_base, name="other", k="2", last_layers=1))  # type: ignore[arg-type]
    how: dict[str, Any] = {"target": ("tiny", "other:0.5"), "steps": 4, "workers": 1}
    near = train(tiny_training(local, tmp_path / "near", **how))
    far = train(tiny_training(url, tmp_path / "far", **how))  # type: ignore[arg-type]
    assert far.losses == near.losses
    asked = []
    for sets in (["tiny"], ["tiny", "other"]):
        cache = open_cache(url)
        loader = Loader(cache, [cache[name] for name in sets], batch_size=16, pixel_sizes=(32,), workers=1)
        with s3.requests() as requests:
            list(loader.batches(0, loader.steps_per_epoch))
        asked.append([r for r in requests if ".zip" in str(r) or ".tar" in str(r)])
    crops = [r for r in asked[0] if ".tar" in str(r)]
    assert len([r for r in asked[1] if ".tar" in str(r)]) == len(crops) > 0
    assert len(asked[1]) == len(asked[0]) + len(crops), "one more for each block"


def test_training_from_s3_gives_the_losses_of_training_from_a_disk(
    s3_cache: str, made_cache: Path, tmp_path: Path
) -> None:
    losses = [
        train(tiny_training(cache, tmp_path / str(i), steps=8)).losses  # type: ignore[arg-type]
        for i, cache in enumerate((s3_cache, made_cache))
    ]
    assert losses[0] == losses[1]


def test_a_block_is_one_request_for_each_file_and_records_need_no_others(s3: S3Server, s3_cache: str) -> None:
    with s3.requests() as opening:
        cache = open_cache(s3_cache)
        cache.require_complete(2, "tiny")
    # a handful of requests, one for each source shard and one for all of them, whatever the number of units
    assert not [r for r in opening if r.method == "HEAD" and "/records/" in r.path]
    assert len([r for r in opening if "/records/" not in r.path.partition("?")[0]]) <= 12
    assert sum("/records/" in r.path.partition("?")[0] for r in opening) == len(cache.shards) + 1
    unit = Unit(0, 0, 1)
    with s3.requests() as records:
        views = cache.views_records(cache.view_units)
    assert Counter(r.method for r in records) == {"GET": len(cache.view_units)}
    target = cache["tiny"]
    record = target.record(unit)
    target.codec  # noqa: B018
    with s3.requests() as block:
        crops = cache.read_crops(views[cache.view_units.index(unit)], range(4, 14))
        arrays = target.read_block(record, 0)
    assert len(crops) == 10
    assert len(arrays) == 3
    assert record.payload is not None
    assert [r.method for r in block] == ["GET", "GET"]
    assert block[1].path.endswith(record.payload.name)


def test_records_are_read_several_at_a_time(made_cache: Path) -> None:
    class Slow(type(open_store(made_cache))):  # type: ignore[misc]
        busy = most = 0
        guard = threading.Lock()

        def read(self, name: str) -> bytes:
            with self.guard:
                Slow.busy += 1
                Slow.most = max(Slow.most, Slow.busy)
            time.sleep(0.02)
            with self.guard:
                Slow.busy -= 1
            return super().read(name)  # type: ignore[no-any-return]

    cache = open_cache(made_cache)
    slow = Cache(Slow(made_cache), cache.manifest)
    assert slow.views_records(cache.view_units) == cache.views_records(cache.view_units)
    assert Slow.most >= 8


def _crops(text: str, count: int = 3) -> list[Crop]:
    return [Crop(f"key{i}", f"{text}{i}".encode() * 50, i) for i in range(count)]


def test_of_two_jobs_that_make_one_unit_one_wins_and_the_other_cleans_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second job commits between the first one's payload and record."""
    unit, original = Unit(0, 0, 0), type(store).put

    def put(self: Store, draft: Path, name: str) -> None:
        original(self, draft, name)
        monkeypatch.setattr(type(store), "put", original)
        commit_views(store, unit, _crops(second), [], "ca" * 32, photos_sha256="fe" * 32)

    for number, second in enumerate(("other", "same")):
        unit = Unit(number, 0, 0)
        monkeypatch.setattr(type(store), "put", put)
        there = commit_views(store, unit, _crops("same"), [], "ca" * 32, photos_sha256="fe" * 32)
        assert there == ViewsRecord.read(store, layout.views_record(unit))
        assert there.payload is not None
        assert [n for n in store.names(layout.VIEWS) if layout.unit_of(n) == unit] == [there.payload.name]
        assert second.encode() + b"0" in store.read(there.payload.name)


def _many_units(url: str, text: str, start: Any) -> None:
    store = open_store(url)
    start.wait()
    for shard in range(15):
        commit_views(
            store, Unit(shard, 0, 0), _crops(text if shard % 3 else "same"), [], "ca" * 32, photos_sha256="fe" * 32
        )


def test_two_processes_that_make_the_same_units_leave_one_payload_for_each_record(s3: S3Server) -> None:
    url, begin = f"s3://bucket/race-{next(NUMBERS)}", forked.barrier(2)
    jobs = [forked.start(_many_units, url, text, begin, environment=s3.environment) for text in ("one", "two")]
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    store = open_store(url)
    records = [ViewsRecord.read(store, layout.views_record(Unit(shard, 0, 0))) for shard in range(15)]
    assert store.names(layout.VIEWS) == [record.payload.name for record in records if record.payload]
    assert all(store.size(record.payload.name) == record.payload.size for record in records if record.payload)


def test_a_record_whose_answer_was_lost_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network library sends a creation again when the answer is lost; the store then says that it exists."""
    store, unit = RemoteStore(f"memory://lost-{next(NUMBERS)}"), Unit(0, 0, 0)
    original = store.fs.pipe_file

    def pipe_file(path: str, value: bytes, **options: Any) -> None:
        original(path, value, **options)
        raise FileExistsError(path)

    monkeypatch.setattr(store.fs, "pipe_file", pipe_file)
    record = commit_views(store, unit, _crops("x"), [], "ca" * 32, photos_sha256="fe" * 32)
    assert record.payload is not None
    assert store.names("") == [layout.views_record(unit), record.payload.name]


class Overwriting(MemoryFileSystem):
    """A store that takes no notice of a condition."""

    protocol = "overwriting"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix(f"{cls.protocol}://").strip("/")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value, mode="overwrite", **options)


class Unaware(Overwriting):
    """A store whose fsspec class is older than conditions."""

    protocol = "unaware"

    def pipe_file(self, path: str, value: bytes) -> None:  # type: ignore[override]
        MemoryFileSystem.pipe_file(self, path, value)


@pytest.mark.parametrize("kind", [Overwriting, Unaware])
def test_a_store_without_conditional_create_takes_one_writer_only(
    kind: type[Overwriting], shards: Path, tiny_base: Path
) -> None:
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
    url = f"{kind.protocol}://cache-{next(NUMBERS)}"
    for changes, ranks in (({}, Ranks(rank=1, world_size=2)), ({"part": "1/2"}, None)):
        with pytest.raises(TecCacheError, match="no conditional create") as error:
            extract(tiny_config(shards, url, tiny_base, limit=4, **changes), ranks=ranks)  # type: ignore[arg-type]
        assert error.value.where == url
    assert open_store(url).names("") == []
    summary = extract(tiny_config(shards, url, tiny_base, limit=4))  # type: ignore[arg-type]
    assert summary.targets_made == 8
    assert not open_store(url).create("cache.json", b"")


def _extract_until_upload(shards: Path, url: str, base: Path, uploads: int) -> None:
    """Extract; after so many uploads send half of one and be killed."""
    put, left = RemoteStore.put, iter(range(uploads))

    def die(self: RemoteStore, draft: Path, name: str) -> None:
        if next(left, None) is not None:
            put(self, draft, name)
            return
        data = draft.read_bytes()
        host, _, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as upload:
            head = f"PUT /{self.root}/{name} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
            upload.sendall(head.encode() + data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    RemoteStore.put = die  # type: ignore[method-assign]
    extract(tiny_config(shards, url, base))  # type: ignore[arg-type]


def test_killed_in_the_middle_of_an_upload_and_resumed_it_holds_the_same_objects(
    s3: S3Server, shards: Path, tiny_base: Path, made_cache: Path
) -> None:
    url = f"s3://bucket/killed-{next(NUMBERS)}"
    for uploads in (3, 9):
        job = forked.start(_extract_until_upload, shards, url, tiny_base, uploads, environment=s3.environment)
        job.join()
        assert job.exitcode == -signal.SIGKILL
        names = open_store(url).names("")
        assert 0 < len(names) < len(without_lock(made_cache))
    extract(tiny_config(shards, url, tiny_base))  # type: ignore[arg-type]
    assert objects(url) == without_lock(made_cache)


def test_drafts_of_killed_jobs_are_cleared_and_those_of_living_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts_module.tempfile, "gettempdir", lambda: str(tmp_path))
    dead, foreign = tmp_path / f"{PREFIX}{'0' * 32}", tmp_path / f"{PREFIX}notes.txt"
    for path in (dead, foreign):
        path.write_bytes(b"x")
        os.utime(path, (1, 1))
    with temporary_file() as living:
        living.write_bytes(b"opened and closed by another writer")
        os.utime(living, (1, 1))
        clear_abandoned(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([living, foreign])
    assert list(tmp_path.iterdir()) == [foreign]


def three_lines(error: TecCacheError) -> str:
    lines = str(error).splitlines()
    assert len(lines) == 3, lines
    assert lines[1].startswith("  where: ")
    assert lines[2].startswith("  to do: ")
    return str(error)


def test_a_server_that_is_gone_is_an_error_in_three_lines(
    s3: S3Server, s3_cache: str, shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    cache = open_cache(s3_cache)
    record = cache.views_record(cache.view_units[0])
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    s3fs.S3FileSystem.clear_instance_cache()
    dead = Cache(open_store(s3_cache), cache.manifest)
    tries: list[Any] = [
        lambda: train(tiny_training(s3_cache, tmp_path / "run")),  # type: ignore[arg-type]
        lambda: extract(tiny_config(shards, s3_cache, tiny_base, views=3)),  # type: ignore[arg-type]
        lambda: extract(tiny_config(shards, s3_cache, tiny_base), ranks=Ranks(0, 0, 2)),  # type: ignore[arg-type]
        lambda: dead.read_crops(record, [0]),
        lambda: dead.views_record(cache.view_units[0]),
    ]
    for attempt in tries:
        with pytest.raises(StorageError) as error:
            attempt()
        # not "damaged": nothing is known of the cache, and nothing is to be repaired
        text = three_lines(error.value)
        assert "Could not connect" in text
        assert "check the network" in text
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_missing_bucket_and_wrong_credentials_are_named(
    s3: S3Server, shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    absent = "s3://nobody-made-this/cache"
    missing: list[Any] = [
        lambda: extract(tiny_config(shards, absent, tiny_base)),  # type: ignore[arg-type]
        lambda: train(tiny_training(absent, tmp_path / "run")),  # type: ignore[arg-type]
    ]
    for attempt in missing:
        with pytest.raises(StorageError) as error:
            attempt()
        assert "bucket does not exist" in three_lines(error.value)
    s3.check_credentials(True)
    try:
        with pytest.raises(StorageError, match="refuses access") as error:
            train(tiny_training("s3://bucket/made", tmp_path / "run"))  # type: ignore[arg-type]
        assert "check the credentials" in three_lines(error.value)
    finally:
        s3.check_credentials(False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="refuses access"):
        train(tiny_training("s3://bucket/made", tmp_path / "run"))  # type: ignore[arg-type]
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_missing_package_and_an_unknown_kind_of_url_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for protocol in ("s3", "s3a"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match="s3fs"):
        open_store("s3://bucket/cache")
    with pytest.raises(ConfigError, match="abc"):
        open_store("abc://bucket/cache")


def test_near_ranges_share_a_request_and_far_ones_do_not() -> None:
    far = 10 * GAP
    assert near_ranges([(100, 50), (far, 5), (0, 100), (150 + GAP, 1)]) == [
        [(0, 100), (100, 50), (150 + GAP, 1)],
        [(far, 5)],
    ]
    assert near_ranges([]) == []


def test_a_bug_is_not_taken_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore("memory://bug")
    monkeypatch.setattr(store.fs, "cat_file", lambda path, **options: {}["no"])
    with pytest.raises(KeyError):
        store.read("x")


def test_a_full_temporary_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="temporary files is full") as error:
        with RemoteStore("memory://full").draft():
            raise OSError(28, "No space left on device")
    assert "TMPDIR" in error.value.todo


def test_a_cache_is_copied_from_a_disk_to_a_bucket_by_its_files_alone(s3: S3Server, made_cache: Path) -> None:
    """A cache holds nothing that depends on where it lies."""
    store = RemoteStore(f"s3://bucket/copied-{next(NUMBERS)}")
    for name in open_store(made_cache).names(""):
        store.fs.put_file(str(made_cache / name), f"{store.root}/{name}")
    assert info(store.url)["missing_units"] == 0
