"""Training on a cache that is not whole: units finished so far, and blocks that are damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.extract import extract
from pipelines.info import info
from pipelines.terminal.texts import extract_text, info_text
from pipelines.train import train
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.opening import open_cache
from tec_cache.codec.quality import errors_text
from tec_cache.errors import CacheError, ConfigError
from tec_cache.loader import Loader
from tests.conftest import codes_of, tiny_config, tiny_training


@pytest.fixture
def half(shards: Path, tiny_base: Path, tmp_path: Path) -> Path:
    """The first of two parts of an extraction."""
    extract(tiny_config(shards, tmp_path / "half", tiny_base, quality="exact", name="tiny", part="1/2"))
    return tmp_path / "half"


def test_finished_units_are_trained_on_only_when_asked(
    half: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(CacheError, match="units are missing"):
        train(tiny_training(half, run))
    there = open_cache(half).finished_groups(2, "tiny")
    assert there
    assert there < {(s, g) for s in range(3) for g in range(3)}
    first = train(tiny_training(half, run, partial=True, epochs=4, steps=2))
    extract(tiny_config(shards, half, tiny_base, quality="exact", name="tiny", part="2/2"))
    # the run goes on with the samples it began with, though all are there now
    last = train(tiny_training(half, run, partial=True, epochs=4))
    assert (first.total_steps, last.total_steps) == (4, 4)
    undisturbed = train(tiny_training(narrow(half, there, tmp_path), tmp_path / "other", partial=True, epochs=4))
    assert undisturbed.losses == last.losses


def narrow(cache: Path, groups: frozenset[tuple[int, int]], tmp_path: Path) -> Path:
    """Copy a cache without the records of other groups."""
    copy = Path(shutil.copytree(cache, tmp_path / "narrow"))
    for record in copy.glob("records/*/**/*-v*.json"):
        unit = Unit.parse(record.stem)
        if (unit.shard, unit.group) not in groups:
            record.unlink()
    return copy


def test_nothing_finished_is_said(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    extract(tiny_config(shards, tmp_path / "c", None, views_only=True))
    extract(tiny_config(None, tmp_path / "c", tiny_base, quality="exact", name="tiny"))
    for record in (tmp_path / "c" / "records/targets/tiny").glob("*/*-v01.json"):
        record.unlink()
    with pytest.raises(CacheError, match="no group of photos is finished"):
        train(tiny_training(tmp_path / "c", tmp_path / "run", partial=True))
    train(tiny_training(tmp_path / "c", tmp_path / "run", partial=True, views=1, epochs=2))


def test_a_damaged_block_is_skipped_and_counted_only_when_asked(made_cache: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made_cache, tmp_path / "cache"))
    cache = open_cache(path)
    unit = Unit(0, 0, 0)
    payload = cache["tiny"].record(unit).payload
    assert payload is not None
    flip(path / payload.name, cache["tiny"].record(unit).blocks["features"][0][0] + 9)
    with pytest.raises(CacheError, match="damaged targets"):
        list(loader(path, skip=False).batches(0, 3))
    whole = list(loader(made_cache, skip=False).batches(0, 3))
    spoiled = loader(path, skip=True)
    replaced = 0
    for good, batch in zip(whole, spoiled.batches(0, 3), strict=True):
        same = torch.tensor(good.sample_keys == batch.sample_keys)
        replaced += int((~same).sum())
        for name, values in codes_of(good).items():
            assert torch.equal(values[same], codes_of(batch)[name][same])
        # a stand-in brings its own crop, targets and key
        for place in (~same).nonzero()[:, 0].tolist():
            (source,) = np.flatnonzero(good.sample_keys == batch.sample_keys[place])
            assert torch.equal(batch.pixels[32][place], good.pixels[32][source])
            assert torch.equal(batch.codes["tiny"]["features"][place], good.codes["tiny"]["features"][source])
    assert replaced == len(cache.views_record(unit).keys) <= BLOCK_ROWS
    assert spoiled.damaged == {f"unit {unit}, block 0: damaged targets"}
    summary = train(tiny_training(path, tmp_path / "run", epochs=2, on_error="skip"))
    assert len(summary.damaged) == 1


def test_on_error_takes_two_words(made_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on-error"):
        tiny_training(made_cache, tmp_path, on_error="ignore")


def loader(path: Path, *, skip: bool) -> Loader:
    cache = open_cache(path)
    return Loader(cache, cache["tiny"], batch_size=32, pixel_sizes=(32,), skip_damage=skip)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_info_of_a_cache_whose_codec_is_not_fitted_yet(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path / "c", tiny_base, name="tiny")
    extract(tiny_config(shards, tmp_path / "c", None, views_only=True))
    extract(config, fit_only=True)
    (tmp_path / "c/targets/tiny/codec.json").unlink()
    target = info(str(tmp_path / "c"))["targets"]["tiny"]
    assert (target["errors"], target["finished_units"], target["missing_units"]) == ({}, 0, 16)
    assert "not fitted yet" in info_text(info(str(tmp_path / "c")))
    extract(config, fit_only=True)
    assert info(str(tmp_path / "c"))["targets"]["tiny"]["errors"]["mse"] > 0


def test_errors_beyond_what_was_asked_are_pointed_out() -> None:
    asked = {"mse": 0.04, "kl": 0.03}
    assert "MORE THAN ASKED" not in errors_text({"mse": 0.041, "kl": 0.03}, asked, 64)
    assert "MORE THAN ASKED (0.04 and 0.03)" in errors_text({"mse": 0.041, "kl": 0.06}, asked, 64)
    assert errors_text({}, asked, 0) == ""


def test_how_many_views_an_error_was_measured_on_is_said(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Twelve photos leave two views or so to measure on: an error that hardly says anything."""
    assert "measured on 1 view that" in errors_text({"mse": 0.04}, {}, 1)
    config = tiny_config(shards, tmp_path / "c", tiny_base, limit=12, views=1, quality="default", fit_views=8)
    summary = extract(config)
    assert summary.checked_views == open_cache(tmp_path / "c")[str(summary.target)].codec_record.checked_views
    text = f"measured on {summary.checked_views} views"
    assert text in extract_text(summary, False, config, True)
    assert text in info_text(info(str(tmp_path / "c")))
