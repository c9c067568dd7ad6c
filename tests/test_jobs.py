"""Jobs that are killed early, run beside others, or run where there are no locks."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.extract import extract
from pipelines.extraction import make_views
from pipelines.verify import verify
from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.data.tar_stream import Members
from tec_cache.data.tars import TarShard
from tec_cache.errors import CacheError, ConfigError, StorageError
from tec_cache.store import open_store
from tec_cache.store.staged import StagedStore
from tests.conftest import files_below, tiny_config, write_shards


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_kill_in_the_first_group_does_not_make_fewer_views(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> Any:
        return tiny_config(shards, tmp_path / name, tiny_base, views=None)

    real, calls = make_views.commit_views, Counter[str]()

    def killed_after_one(*args: Any, **kwargs: Any) -> Any:
        calls["commit"] += 1
        if calls["commit"] == 2:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(make_views, "commit_views", killed_after_one)
    with pytest.raises(Killed):
        extract(config("killed"))
    monkeypatch.setattr(make_views, "commit_views", real)
    assert extract(config("killed")).num_views == 4
    extract(config("whole"))
    assert files_below(tmp_path / "killed") == files_below(tmp_path / "whole")


def test_overwrite_takes_one_process_not_a_part(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    extract(tiny_config(shards, tmp_path / "c", tiny_base, part="1/2"))
    before = files_below(tmp_path / "c")
    with pytest.raises(ConfigError, match="parts at once"):
        extract(tiny_config(shards, tmp_path / "c", tiny_base, part="2/2"), overwrite=True)
    assert files_below(tmp_path / "c") == before


def test_the_remedy_that_a_damaged_crop_names_mends_it(made_cache: Path, tmp_path: Path, shards: Path,
                                                       tiny_base: Path) -> None:  # fmt: skip
    path = Path(shutil.copytree(made_cache, tmp_path / "cache"))
    cache = open_cache(path)
    record = cache.views_record(Unit(0, 0, 0))
    assert record.payload is not None
    data = bytearray((path / record.payload.name).read_bytes())
    data[record.offsets[3] + 50] ^= 4
    (path / record.payload.name).write_bytes(data)
    with pytest.raises(CacheError, match="verify CACHE --full --repair") as error:
        cache.read_crops(record, range(5))
    assert "the same tec-cache extract" in error.value.todo
    verdict = verify(str(path), full=True, repair=True)
    assert len(verdict.dropped) == 1
    extract(tiny_config(shards, path, None, name="tiny"))
    assert verify(str(path), full=True).clean
    assert files_below(path) == files_below(made_cache)


def test_without_locks_nothing_of_another_job_is_removed(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that has none, as Lustre without `flock`: nobody can say whether another job is at work."""

    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "lockf", none)
    path = tmp_path / "c"
    extract(tiny_config(shards, path, None, views_only=True, part="1/2"))
    strangers = [path / ".drafts" / "half", path / layout.views_payload(Unit(1, 0, 0), "0123456789abcdef" * 4)]
    for file in strangers:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"of a job that runs elsewhere")
    extract(tiny_config(shards, path, tiny_base))
    assert all(file.exists() for file in strangers)
    assert verify(str(path), full=True).clean


def test_a_network_that_fails_is_never_recorded_as_damage(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reset(Exception):
        """As network libraries raise: not an OSError."""

    for error in (ConnectionResetError(errno.ECONNRESET, "reset"), Reset("reset")):
        real = Members.read

        def failing(self: Any, info: Any, error: Exception = error, real: Any = real) -> Any:
            if info.name == "p00050.jpg":
                raise error
            return real(self, info)

        monkeypatch.setattr(Members, "read", failing)
        with pytest.raises(StorageError, match="cannot be read"):
            extract(tiny_config(shards, tmp_path / "c", None, views_only=True, on_error="skip"))
        monkeypatch.setattr(Members, "read", real)
    assert not (tmp_path / "c/records/source/000001.json").exists()
    assert extract(tiny_config(shards, tmp_path / "c", None, views_only=True, on_error="skip")).photos == 97


def test_parts_open_their_own_shards_once(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = write_shards(tmp_path / "in", [3] * 8)
    opened: Counter[str] = Counter()
    real = TarShard.photos

    def counted(self: TarShard, *args: Any) -> Any:
        opened[self.name] += 1
        return real(self, *args)

    monkeypatch.setattr(TarShard, "photos", counted)
    extract(tiny_config(many, tmp_path / "c", None, views_only=True, part="2/2"))
    assert len(opened) == 4
    extract(tiny_config(many, tmp_path / "c", None, views_only=True, part="1/2"))
    assert set(opened.values()) == {1}
    opened.clear()
    extract(tiny_config(many, tmp_path / "whole", tiny_base, quality="default"))
    assert opened == {f"shard-{i:06d}.tar": 2 for i in range(8)}, "once for the sample of the fit, once for the views"
    opened.clear()
    extract(tiny_config(many, tmp_path / "c", tiny_base, quality="default"))
    assert not opened, "the fit reads crops where they are committed"


def test_extract_runs_within_an_event_loop(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """As in a notebook."""

    async def cell() -> int:
        return extract(tiny_config(shards, tmp_path / "c", tiny_base, limit=20)).targets_made

    assert asyncio.run(cell()) == 40


def test_a_damaged_copy_of_a_pack_is_fetched_again(made_cache: Path, tmp_path: Path) -> None:
    from pipelines.pack import pack
    from tec_cache.pack.reader import open_pack

    pack(str(made_cache), str(tmp_path / "pack"))
    opened = open_pack(StagedStore(open_store(tmp_path / "pack"), tmp_path / "stage", None))
    unit = opened.view_units[0]
    record, target = opened.views_record(unit), opened["tiny"]
    first = opened.read_block(record, 0, (target,), (target.record(unit),))
    (copy,) = (p for p in (tmp_path / "stage").rglob("*.tar") if str(unit) in p.name)
    data = bytearray(copy.read_bytes())
    data[record.offsets[0] + 9] ^= 1
    copy.write_bytes(data)
    again = opened.read_block(record, 0, (target,), (target.record(unit),))
    assert again[0] == first[0]
