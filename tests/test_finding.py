"""Samples found again: by their key, and the rows of a batch by name."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.extract import extract
from pipelines.index import index
from pipelines.pack import pack
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.errors import CacheError, ConfigError
from tec_cache.loader import Batch, Loader
from tests.conftest import payload_of, tiny_config, write_shards


def members(cache: Cache, unit: Unit) -> dict[str, bytes]:
    with tarfile.open(payload_of(cache, unit)) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}  # type: ignore[union-attr]


@pytest.fixture(params=["indexed", "records", "packed"])
def cache(request: pytest.FixtureRequest, made_cache: Path, tmp_path: Path) -> Cache:
    """The same cache, known by its index, by its records alone, and as a pack."""
    shutil.copytree(made_cache, tmp_path / "cache")
    if request.param == "packed":
        pack(tmp_path / "cache", tmp_path / "pack")
        return open_cache(tmp_path / "pack")
    if request.param == "records":
        for file in (tmp_path / "cache").rglob("*index*"):
            file.unlink() if file.is_file() else shutil.rmtree(file)
    else:
        index(tmp_path / "cache")
    opened = open_cache(tmp_path / "cache")
    assert (opened.index is None) == (request.param == "records")
    return opened


def test_every_key_is_found_where_its_crop_lies(cache: Cache, made_cache: Path) -> None:
    plain = open_cache(made_cache)
    seen = 0
    for unit in plain.view_units:
        files, record = members(plain, unit), plain.views_record(unit)
        for row, key in enumerate(record.keys):
            found = cache.find(key, view=unit.view)
            assert (found.unit, found.row, found.label) == (unit, row, record.labels[row])
            assert found.name == (plain.shards[unit.shard], key)
            (own,) = (data for name, data in files.items() if name.startswith(f"{key}-v"))
            assert found.crop() == own
            seen += 1
    assert seen == sum(len(plain.views_record(unit).keys) for unit in plain.view_units) > 50
    expected = np.asarray(Image.open(io.BytesIO(own)))
    assert np.abs(found.pixels().astype(int) - expected).max() <= 2  # another decoder's rounding


def test_its_targets_are_those_of_its_row(cache: Cache, made_cache: Path) -> None:
    plain = open_cache(made_cache)
    (name,) = plain.target_names
    unit = plain.view_units[-1]
    arrays = plain[name].read_unit(plain[name].record(unit))
    whole = plain[name].decode({part: torch.from_numpy(rows) for part, rows in arrays.items()})
    for row, key in enumerate(plain.views_record(unit).keys):
        found = cache.find(key, view=unit.view).targets(name)
        torch.testing.assert_close(found.features[0], whole.features[row])
        assert found.attention is not None
        assert whole.attention is not None
        torch.testing.assert_close(found.attention[0], whole.attention[row])
    other = cache.find(key).view(unit.view)
    assert other.unit == unit


def test_a_batch_names_its_rows(cache: Cache) -> None:
    loader: Loader[Batch] = Loader(cache, cache[cache.target_names[0]], batch_size=8, pixel_sizes=(cache.size,))
    for batch in loader.batches(0, 2):
        names = batch.names(cache)
        assert len(names) == len(batch)
        for row, (shard, key) in enumerate(names):
            found = cache.find(key, view=batch.epoch, shard=shard)
            assert found.label == int(batch.labels[row])
            assert (found.pixels() == batch.pixels[cache.size][row].numpy()).all()


def test_what_is_not_there_is_said(cache: Cache) -> None:
    key = cache.views_record(cache.view_units[0]).keys[0]
    with pytest.raises(ConfigError, match=f"no photo with the key '{key}x'.*did you mean '?{key}"):
        cache.find(key + "x")
    with pytest.raises(ConfigError, match=r"no source shard 'shard-00000\.tar'"):
        cache.find(key, shard="shard-00000.tar")
    with pytest.raises(ConfigError, match=f"view 9 of '{key}' is not stored"):
        cache.find(key, view=9)
    with pytest.raises(ConfigError, match="no photo"):
        cache.find(key, shard=cache.shards[-1])
    loader: Loader[Batch] = Loader(cache, cache[cache.target_names[0]], batch_size=8, pixel_sizes=(cache.size,))
    batch = next(iter(loader.batches(0, 1)))
    strange = Batch(batch.epoch, batch.pixels, batch.codes, batch.labels, batch.sample_keys + np.uint64(1))
    with pytest.raises(CacheError, match="8 samples are of no photo of this cache"):
        strange.names(cache)


def test_a_key_of_several_shards_wants_the_shard(tmp_path: Path, tiny_base: Path) -> None:
    write_shards(tmp_path / "shards", [3])
    shutil.copy(tmp_path / "shards" / "shard-000000.tar", tmp_path / "shards" / "again.tar")
    extract(tiny_config(tmp_path / "shards", tmp_path / "cache", None, views_only=True))
    cache = open_cache(tmp_path / "cache")
    with pytest.raises(
        ConfigError, match=r"2 shards have a photo with the key 'p00001': again\.tar, shard-000000\.tar"
    ):
        cache.find("p00001")
    assert cache.find("p00001", shard="again.tar").name == ("again.tar", "p00001")
    with pytest.raises(ConfigError, match="no target set 'mae'"):
        cache.find("p00001", shard="again.tar").targets("mae")
