"""Caches made apart and joined: the whole is byte for byte the one made in one piece, and nothing is mixed."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cli
from pipelines.extract import extract
from pipelines.merge import merge
from pipelines.pack import pack
from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.record import CodecRecord, Payload, SourceRecord
from tec_cache.cache.writer import Crop, commit_views
from tec_cache.errors import CacheError, ConfigError, IdentityError, TecCacheError
from tec_cache.store import open_store
from tec_cache.store.files import hash_file
from tests.conftest import files_below, payload_of, tiny_config, write_shards
from tests.test_pack import Killed, flip, kill_at

NUMBERS = itertools.count()


def fitted_parts(folder: Path, photos: Path, base: Path, quality: str) -> list[Path]:
    """Fit once, copy the fitted cache into three folders, extract one third into each."""
    parts = [folder / f"part-{i}" for i in range(3)]
    settings: dict[str, Any] = {"quality": quality, "fit_views": None if quality == "exact" else 32}
    extract(tiny_config(photos, folder / "fitted", base, **settings), fit_only=True)
    for i, part in enumerate(parts):
        shutil.copytree(folder / "fitted", part)
        extract(tiny_config(photos, part, base, part=f"{i + 1}/3", **settings))
    extract(tiny_config(photos, folder / "whole", base, **settings))
    return parts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """`photos`, `whole` (a cache of six units), and the same in `part-0` to `part-2`."""
    folder = tmp_path_factory.mktemp("apart")
    photos = write_shards(folder / "photos", [30, 9])
    fitted_parts(folder, photos, tiny_base, "default")
    return folder


def parts_of(made: Path) -> list[str]:
    return [str(made / f"part-{i}") for i in range(3)]


@pytest.fixture
def part(made: Path, tmp_path: Path) -> Path:
    """A copy of the first part."""
    return Path(shutil.copytree(made / "part-0", tmp_path / "part"))


def test_three_parts_are_the_undivided_cache_byte_for_byte(made: Path, tmp_path: Path) -> None:
    before = [files_below(Path(part)) for part in parts_of(made)]
    assert all(len(open_cache(part).view_units) < 6 for part in parts_of(made))
    summary = merge(str(tmp_path / "out"), parts_of(made))
    assert files_below(tmp_path / "out") == files_below(made / "whole")
    assert (summary.views_copied, summary.targets_copied, summary.already_there) == (6, 6, 0)
    assert [files_below(Path(part)) for part in parts_of(made)] == before, "the parts stay as they are"
    again = merge(str(tmp_path / "out"), parts_of(made))
    assert (again.views_copied, again.targets_copied, again.already_there, again.bytes) == (0, 0, 12, 0)
    assert files_below(tmp_path / "out") == files_below(made / "whole")


def test_exact_parts_need_no_common_fit(made: Path, tiny_base: Path, tmp_path: Path) -> None:
    photos = made / "photos"
    for i in range(2):
        extract(tiny_config(photos, tmp_path / f"{i}", tiny_base, part=f"{i + 1}/2"))
    extract(tiny_config(photos, tmp_path / "whole", tiny_base))
    merge(str(tmp_path / "out"), [str(tmp_path / "1"), str(tmp_path / "0")])
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")


def test_a_part_may_take_in_the_others(made: Path, part: Path) -> None:
    merge(str(part), parts_of(made)[1:])
    assert files_below(part) == files_below(made / "whole")


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7, 8, 11, 20, 29])
def test_a_killed_merge_goes_on_and_names_nothing_that_is_not_there(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            merge(str(out), parts_of(made))
    if (out / layout.MANIFEST).exists():
        cache = open_cache(out)
        for unit in cache.view_units:
            cache.read_crops(cache.views_record(unit), [0])
        for unit in cache["tiny"].units if "tiny" in cache.target_names else []:
            cache["tiny"].read_block(cache["tiny"].record(unit), 0)
    merge(str(out), parts_of(made))
    assert files_below(out) == files_below(made / "whole")


def test_both_ends_may_be_urls(made: Path, tmp_path: Path) -> None:
    first, out = (f"memory://merge-{next(NUMBERS)}/{name}" for name in ("part", "out"))
    merge(first, parts_of(made)[:1])
    merge(out, [*parts_of(made)[1:], first])
    store = open_store(out)
    assert {n: store.read(n) for n in store.names("")} == {
        name: data for name, data in files_below(made / "whole").items() if name != ".lock"
    }


def test_damage_in_a_part_is_named_and_not_taken_over(made: Path, part: Path, tmp_path: Path) -> None:
    cache = open_cache(part)
    unit = cache.view_units[-1]
    for target in (None, "tiny"):
        path, out = payload_of(cache, unit, target), tmp_path / f"out-{target}"
        whole = path.read_bytes()
        for harm in (0, 1, 2):
            if harm == 0:
                flip(path, len(whole) - 3)  # padding of the tar, end of the zip: no crop or block of codes
            elif harm == 1:
                path.write_bytes(whole[:-512])
            else:
                path.unlink()
            with pytest.raises(CacheError, match="damaged payload") as caught:
                merge(str(out), [str(part), *parts_of(made)[1:]])
            assert caught.value.where == str(path)
            assert not (
                out / (layout.views_record(unit) if target is None else layout.target_record(target, unit))
            ).exists()
            assert not list(out.glob(f"**/{path.name}"))
            path.write_bytes(whole)
        merge(str(out), [str(part), *parts_of(made)[1:]])
        assert files_below(out) == files_below(made / "whole")
    flip(part / layout.views_record(unit), 40)
    with pytest.raises(CacheError, match="damaged record"):
        merge(str(tmp_path / "new"), [str(part)])
    (part / layout.views_record(unit)).unlink()
    with pytest.raises(CacheError, match="damaged record"):
        merge(str(tmp_path / "newer"), [str(part)])


def test_other_settings_are_refused_by_field_before_anything_is_written(
    made: Path, tiny_base: Path, tmp_path: Path
) -> None:
    photos, out = made / "photos", tmp_path / "out"
    extract(tiny_config(photos, tmp_path / "seed", tiny_base, seed=3, limit=12))
    with pytest.raises(IdentityError, match=r"views\.seed: stored 0, asked 3") as caught:
        merge(str(out), [*parts_of(made), str(tmp_path / "seed")])
    assert caught.value.where == str(tmp_path / "seed")
    extract(tiny_config(photos, tmp_path / "batch", tiny_base, quality="default", fit_views=32, batch_size=4))
    with pytest.raises(IdentityError, match=r"target set 'tiny'.*(?s:.*)batch_size: stored 8, asked 4"):
        merge(str(out), [*parts_of(made), str(tmp_path / "batch")])
    assert not out.exists()
    before = files_below(made / "part-1")
    with pytest.raises(IdentityError, match="batch_size"):
        merge(str(made / "part-1"), [str(tmp_path / "batch")])
    assert files_below(made / "part-1") == before


def test_parts_fitted_apart_are_refused_with_the_remedy(made: Path, part: Path, tmp_path: Path) -> None:
    store, name = open_store(part), layout.codec_record("tiny")
    record = CodecRecord.read(store, name)
    assert record.payload is not None
    data = bytearray(store.read(record.payload.name))
    data[-1] ^= 1
    (tmp_path / "codec").write_bytes(data)
    sha256 = hash_file(tmp_path / "codec")
    payload = Payload(layout.codec_payload("tiny", sha256), len(data), sha256)
    store.remove(record.payload.name)
    store.put(tmp_path / "codec", payload.name)
    store.remove(name)
    CodecRecord(**record.values() | {"payload": payload}).create(store, name)
    with pytest.raises(IdentityError, match="fitted apart") as caught:
        merge(str(tmp_path / "out"), [*parts_of(made)[1:], str(part)])
    assert "tec-cache fit once" in caught.value.todo
    assert "targets/tiny/" in caught.value.todo
    assert not (tmp_path / "out").exists()


def test_another_reading_of_a_source_shard_is_refused(made: Path, part: Path, tmp_path: Path) -> None:
    store, name = open_store(part), layout.source_record(1)
    record = SourceRecord.read(store, name)
    store.remove(name)
    store.remove(layout.CONTENT_RECORD)  # which would tell by itself
    SourceRecord(**record.values() | {"photos": 8, "damage": "cut off"}).create(store, name)
    with pytest.raises(IdentityError, match=r"photos: stored 9, asked 8") as caught:
        merge(str(tmp_path / "out"), [*parts_of(made)[1:], str(part)])
    assert caught.value.where == str(part / name)
    assert not (tmp_path / "out").exists()


def other_crops(cache: Path, unit: Unit) -> None:
    """Make a unit of views again from other crops, as another decoder might."""
    opened = open_cache(cache)
    record = opened.views_record(unit)
    crops = opened.read_crops(record, range(len(record.keys)))
    payload_of(opened, unit).unlink()
    (cache / layout.views_record(unit)).unlink()
    again = [Crop(key, crops[-1], label) for key, label in zip(record.keys, record.labels, strict=True)]
    commit_views(opened.store, unit, again, [], record.identity, photos_sha256=record.photos_sha256)


def test_of_two_different_units_the_first_stays_and_its_targets_only(made: Path, part: Path, tmp_path: Path) -> None:
    unit, out = open_cache(part).view_units[0], tmp_path / "out"
    name = layout.target_record("tiny", unit)
    merge(str(out), parts_of(made))
    harmed = Path(shutil.copytree(part, tmp_path / "harmed"))
    other_crops(harmed, unit)
    (harmed / name).unlink()
    summary = merge(str(out), [str(harmed)])
    assert summary.different == [f"views/{unit.folder}/{unit} of {harmed}"]
    assert files_below(out) == files_below(made / "whole")
    # the other way round: OUT has other crops and no targets over them; the part's do not fit them
    payload_of(open_cache(harmed), unit)
    with pytest.raises(CacheError, match=rf"left out: 1: tiny {unit} of {part}") as caught:
        merge(str(harmed), [str(part), *parts_of(made)[1:]])
    assert "tec-cache extract" in caught.value.todo
    assert not (harmed / name).exists()
    cache = open_cache(harmed)
    assert cache.missing_units(2) == []
    assert cache.missing_units(2, "tiny") == [unit], "all else was merged"


def test_what_is_not_meant_is_refused(made: Path, tmp_path: Path) -> None:
    pack(str(made / "whole"), str(tmp_path / "pack"))
    with pytest.raises(ConfigError, match="this is a pack"):
        merge(str(tmp_path / "out"), [str(tmp_path / "pack")])
    with pytest.raises(ConfigError, match="this is a pack"):
        merge(str(tmp_path / "pack"), parts_of(made))
    with pytest.raises(ConfigError, match="one of its own parts"):
        merge(str(made / "part-0"), parts_of(made))
    with pytest.raises(TecCacheError, match="there is no cache here"):
        merge(str(tmp_path / "out"), [str(tmp_path / "nothing")])
    with pytest.raises(ConfigError, match="no part was named"):
        merge(str(tmp_path / "out"), [])
    assert not (tmp_path / "out").exists()


def test_the_command(made: Path, tmp_path: Path) -> None:
    runner, out = CliRunner(), str(tmp_path / "out")
    result = runner.invoke(cli.cli, ["merge", out, *parts_of(made), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["views_copied"] == 6
    assert (
        "12 units that the cache had already"
        in runner.invoke(cli.cli, ["merge", out, *parts_of(made), "--quiet"]).stdout
    )
    assert runner.invoke(cli.cli, ["merge", out]).exit_code == 2
