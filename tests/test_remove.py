"""tec-cache rm: what was named goes, records first; every other byte stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from pipelines.extract import extract
from pipelines.info import info
from pipelines.pack import pack
from pipelines.remove import remove
from tec_cache.cache.opening import open_cache
from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.store import open_store
from tests.conftest import files_below, tiny_config
from tests.test_extract import another_job
from tests.test_pack import Killed, kill_at


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_base: Path) -> Path:
    """A cache of one shard: six units of views, the sets "tiny" and "other"."""
    cache = tmp_path_factory.mktemp("rm") / "cache"
    extract(tiny_config(shards, cache, tiny_base, limit=40))
    extract(tiny_config(None, cache, tiny_base, name="other", k="2"))
    return cache


@pytest.fixture(scope="module")
def one_view(
    two_sets: Path, tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_base: Path
) -> dict[str, bytes]:
    """Files of the same cache, extracted with one view; but for the codecs, whose errors were measured in two."""
    cache = tmp_path_factory.mktemp("rm-one") / "cache"
    extract(tiny_config(shards, cache, tiny_base, limit=40, views=1))
    extract(tiny_config(None, cache, tiny_base, name="other", k="2"))
    return files_below(cache) | {n: d for n, d in files_below(two_sets).items() if n.endswith("codec.json")}


@pytest.fixture
def cache(two_sets: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_sets, tmp_path / "cache"))


def without(files: dict[str, bytes], part: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not belongs(name, part)}


def belongs(name: str, part: str) -> bool:
    """Whether a file's name has this part, or it says that these views were asked for."""
    return part in name or name == f"records/asked/{part.removeprefix('-v')}.json"


def without_set(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Leave out what belongs to a target set."""
    return {n: d for n, d in files.items() if f"targets/{name}/" not in n and n != f"index/targets/{name}.idx"}


def test_a_target_set_goes_and_nothing_else(cache: Path, two_sets: Path, tiny_base: Path) -> None:
    (cache / "targets" / "tiny" / "notes.txt").write_text("mine")
    planned = remove(str(cache), target="tiny", dry_run=True)
    assert without(files_below(cache), "notes.txt") == files_below(two_sets), "a dry run removes nothing"
    summary = remove(str(cache), target="tiny")
    assert planned == summary
    before = files_below(two_sets)
    assert summary.bytes == sum(map(len, before.values())) - sum(map(len, without_set(before, "tiny").values()))
    assert (summary.units, summary.left_views, summary.left_units, summary.left_targets) == (6, 2, 6, {"other": 6})
    assert (cache / "targets" / "tiny" / "notes.txt").read_text() == "mine"
    assert without(files_below(cache), "notes.txt") == without_set(before, "tiny")
    extract(tiny_config(None, cache, tiny_base))
    assert without(files_below(cache), "notes.txt") == before, "extracted again it is the same"


def test_later_views_go_with_the_targets_over_them(
    cache: Path, two_sets: Path, one_view: dict[str, bytes], shards: Path, tiny_base: Path
) -> None:
    planned = remove(str(cache), views=1, dry_run=True)
    assert files_below(cache) == files_below(two_sets)
    summary = remove(str(cache), views=1)
    assert planned == summary
    before = files_below(two_sets)
    assert files_below(cache) == one_view
    assert without(one_view, "index/") == without(without(before, "-v01"), "index/")
    assert summary.bytes == sum(len(data) for name, data in before.items() if belongs(name, "-v01"))
    assert (summary.units, summary.left_views, summary.left_units) == (9, 1, 3)
    assert summary.left_targets == {"tiny": 3, "other": 3}
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix in (".idx", ".json")}
    assert remove(str(cache), views=1).bytes == 0, "twice is once"
    assert {path: path.stat().st_mtime_ns for path in times} == times
    extract(tiny_config(shards, cache, tiny_base, limit=40))
    extract(tiny_config(None, cache, tiny_base, name="other", k="2"))
    assert files_below(cache) == before


@pytest.mark.parametrize("step", [1, 4, 7, 8, 9, 13, 19, 20])
@pytest.mark.parametrize("what", ["target", "views"])
def test_killed_in_the_middle_a_smaller_valid_cache_is_left(
    cache: Path,
    two_sets: Path,
    one_view: dict[str, bytes],
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    step: int,
) -> None:
    choice = {"target": "tiny"} if what == "target" else {"views": 1}
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        try:
            remove(str(cache), **choice)  # type: ignore[arg-type]
        except Killed:
            pass
        else:
            assert step > 14
            return
    info(str(cache))
    left = open_cache(cache)
    left.require_complete(1 if what == "views" else 2)
    left.require_complete(1 if what == "views" else 2, "other")
    for name in left.target_names:
        for unit in left[name].units:
            left[name].read_unit(left[name].record(unit))
    if step % 2:
        remove(str(cache), **choice)  # type: ignore[arg-type]
        assert files_below(cache) == (without_set(files_below(two_sets), "tiny") if what == "target" else one_view)
    elif what == "target":
        extract(tiny_config(None, cache, tiny_base))
        assert files_below(cache) == files_below(two_sets), "extract goes on from there as well"


def test_what_is_not_meant_is_refused(cache: Path, two_sets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="what is to be removed"):
        remove(str(cache))
    with pytest.raises(ConfigError, match="what is to be removed"):
        remove(str(cache), target="tiny", views=1)
    with pytest.raises(ConfigError, match=r"no target set 'tinny' \(did you mean tiny\?\)") as caught:
        remove(str(cache), target="tinny")
    assert caught.value.todo == "it has: other, tiny"
    with pytest.raises(ConfigError, match="--views 0"):
        remove(str(cache), views=0)
    with pytest.raises(ConfigError, match="there is no cache here"):
        remove(str(tmp_path / "nothing"), views=1)
    assert not (tmp_path / "nothing").exists()
    pack(str(cache), str(tmp_path / "pack"))
    with pytest.raises(ConfigError, match="a pack is not changed"):
        remove(str(tmp_path / "pack"), target="tiny")
    with another_job(cache, "share"), pytest.raises(TecCacheError, match="another job is writing"):
        remove(str(cache), target="tiny")
    assert files_below(cache) == files_below(two_sets)


def test_a_cache_behind_a_url(two_sets: Path, one_view: dict[str, bytes]) -> None:
    store = open_store("memory://rm-0/cache")
    for name, data in files_below(two_sets).items():
        store.create(name, data)
    assert remove(store.url, target="other").left_targets == {"tiny": 6}
    remove(store.url, views=1)
    expected = without_set(one_view, "other")
    assert {n: store.read(n) for n in store.names("")} == {n: d for n, d in expected.items() if n != ".lock"}


def test_the_command(cache: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(cli.cli, ["rm", str(cache), "--target", "other", "--dry-run"])
    assert "nothing was removed" in result.stdout
    assert "target sets: tiny (6 units)" in result.stdout
    result = runner.invoke(cli.cli, ["rm", str(cache), "--target", "other", "--json"])
    assert json.loads(result.stdout)["left_targets"] == {"tiny": 6}
