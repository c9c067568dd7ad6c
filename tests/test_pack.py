"""Packs: the same batches, every damage noticed, and the cache back byte for byte."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
import webdataset as wds
from click.testing import CliRunner

import cli
from pipelines.extract import extract
from pipelines.info import info
from pipelines.pack import pack, refuse_alike
from pipelines.train import train
from pipelines.unpack import unpack
from pipelines.verify import verify
from tec_cache.cache import blocks, layout
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import PackRecord
from tec_cache.errors import CacheError, ConfigError, IdentityError, TecCacheError
from tec_cache.loader import Batch, Loader
from tec_cache.pack.reader import Pack
from tec_cache.run.metrics import read_metrics
from tec_cache.store import open_store
from tec_cache.store.local import LocalStore
from tests.conftest import codes_of, encoded, files_below, photo, tiny_config, tiny_training, write_shards, write_tar

NUMBERS = itertools.count()


class Killed(BaseException):
    """Nobody catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the `step`th change of a local store raise instead."""
    steps = itertools.count(1)

    def counted(change: Any) -> Any:
        def call(self: LocalStore, *args: Any) -> Any:
            if next(steps) >= step:
                raise Killed
            return change(self, *args)

        return call

    for name in ("put", "create", "remove"):
        monkeypatch.setattr(LocalStore, name, counted(getattr(LocalStore, name)))


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A small cache of two views with an exact set "tiny" and a fitted set "coded"; one unit holds no sample."""
    folder = tmp_path_factory.mktemp("two")
    write_shards(folder / "photos", [40, 9])
    broken = [(f"x{i}.jpg", b"no photo") for i in range(16)]
    odd = [("long/" + "k" * 90 + ".jpg", encoded(photo(5))), ("a b/%é.jpg", encoded(photo(6)))]
    write_tar(folder / "photos" / "shard-000002.tar", broken + odd)
    cache = folder / "cache"
    shards = folder / "photos"
    extract(tiny_config(shards, cache, tiny_base, group_size=16, on_error="skip"))
    extract(tiny_config(None, cache, tiny_base, name="coded", quality="default", fit_views=32))
    return cache


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, two_sets: Path) -> Path:
    out = tmp_path_factory.mktemp("packs") / "pack"
    pack(str(two_sets), str(out))
    return out


@pytest.fixture
def pack_copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "pack"))


def batches(path: Path, name: str | None, **options: Any) -> list[Batch]:
    cache = open_cache(path)
    loader = Loader(cache, cache[name] if name else (), batch_size=16, pixel_sizes=(32, 24), **options)
    return list(loader.batches(0, 2 * loader.steps_per_epoch))


@pytest.mark.parametrize("name", ["tiny", "coded", None])
def test_batches_of_a_pack_are_those_of_its_cache(two_sets: Path, packed: Path, name: str | None) -> None:
    ours, theirs = batches(packed, name), batches(two_sets, name)
    assert len(ours) == len(theirs) > 4
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.sample_keys, b.sample_keys)
        assert torch.equal(a.labels, b.labels)
        assert codes_of(a).keys() == codes_of(b).keys()
        assert bool(codes_of(b)) == bool(name)
        for key, values in codes_of(b).items():
            assert codes_of(a)[key].dtype == values.dtype
            assert torch.equal(codes_of(a)[key], values)
        for size, pixels in b.pixels.items():
            assert torch.equal(a.pixels[size], pixels)


def test_a_block_is_one_range_of_one_file(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(packed)
    views = cache.views_record(cache.view_units[0])
    targets = cache["coded"]
    coded = targets.record(cache.view_units[0], views)
    assert len(targets.codec.arrays(targets.spec)) == 4, "the codec is read here, once"
    reads: list[tuple[str, int]] = []
    read_ranges = LocalStore.read_ranges

    def counted(self: LocalStore, name: str, ranges: Any) -> list[bytes]:
        reads.append((name, len(ranges)))
        return read_ranges(self, name, ranges)

    monkeypatch.setattr(LocalStore, "read_ranges", counted)
    cache.read_block(views, 0, (targets,), (coded,))
    assert views.payload is not None
    assert reads == [(views.payload.name, 1)]


def test_a_run_begun_on_the_cache_goes_on_with_the_pack(two_sets: Path, packed: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 16, "epochs": 4, "target": "coded"}
    train(tiny_training(two_sets, tmp_path / "whole", steps=6, **options))
    train(tiny_training(two_sets, tmp_path / "half", steps=3, **options))
    train(tiny_training(packed, tmp_path / "half", steps=6, **options))
    train(tiny_training(packed, tmp_path / "packed", steps=6, **options))
    losses = [
        [(line["step"], line["loss"]) for line in read_metrics(tmp_path / name)] for name in ("whole", "half", "packed")
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1] == losses[2]


def test_info_and_fingerprints_are_the_caches(two_sets: Path, packed: Path) -> None:
    ours, theirs = info(str(packed)), info(str(two_sets))
    for name in ("fingerprint", "num_views", "skipped_photos", "missing_units", "unread_shards"):
        assert ours[name] == theirs[name], name
    for name in ("tiny", "coded"):
        for field in ("base", "errors", "quality", "views", "finished_units", "missing_units"):
            assert ours["targets"][name][field] == theirs["targets"][name][field], field
        assert open_cache(packed)[name].fingerprint == open_cache(two_sets)[name].fingerprint


def test_a_pack_narrowed_to_some_groups_is_a_pack(two_sets: Path, packed: Path) -> None:
    ours, theirs = (open_cache(path).narrowed([(0, 1), (1, 0)]) for path in (packed, two_sets))
    assert isinstance(ours, Pack)
    assert ours.view_units == ours["coded"].units == theirs.view_units
    assert ours.finished_groups(2, "coded") == theirs.finished_groups(2, "coded") == {(0, 1), (1, 0)}
    ours.require_complete(2, "coded")
    with pytest.raises(CacheError, match="units are missing"):
        open_cache(packed).narrowed([(0, 7)]).require_complete(1)


def test_plain_webdataset_and_numcodecs_read_a_pack(two_sets: Path, packed: Path) -> None:
    """As `tec_cache.pack.frames` says, and with nothing of this project."""
    sets = json.loads((packed / "pack.json").read_text())["body"]["identity"]["targets"]
    cache = open_cache(two_sets)
    seen = 0
    for unit in cache.view_units:
        urls = [str(path) for path in packed.glob(f"samples/{unit.folder}/{unit}.*.tar")]
        views = cache.views_record(unit)
        assert len(urls) == bool(views.keys)
        samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False)) if urls else []
        crops = cache.read_crops(views, range(len(views.keys)))
        assert [sample["jpg"] for sample in samples] == crops
        assert [sample["__key__"] for sample in samples] == [layout.crop_name(key, unit.view) for key in views.keys]
        assert [int(s["cls"]) if "cls" in s else None for s in samples] == views.labels
        for name in ("tiny", "coded"):
            expected = cache[name].read_unit(cache[name].record(unit))
            for row, sample in enumerate(samples):
                member, start = sample[f"{name}.tec"], 8
                assert member[:4] == b"tec\x03"
                assert int.from_bytes(member[4:8], "little") == zlib.crc32(sample["jpg"])
                for array, dtype, shape in sets[name]["arrays"]:
                    end = start + int.from_bytes(member[start + 12 : start + 16], "little")
                    assert zlib.crc32(member[start:end]) == int.from_bytes(member[end : end + 4], "little")
                    data = numcodecs.blosc.decompress(member[start:end])
                    values = np.frombuffer(data, dtype, math.prod(shape)).reshape(shape)
                    assert np.array_equal(values, expected[array][row])
                    start = end + 4
                assert start == len(member)
                seen += 1
    assert seen == 4 * 51


def test_unpacking_gives_the_cache_back_byte_for_byte(two_sets: Path, packed: Path, tmp_path: Path) -> None:
    summary = unpack(str(packed), str(tmp_path / "back"))
    assert files_below(tmp_path / "back") == files_below(two_sets)
    assert (summary.units, summary.units_made, summary.rewritten) == (12, 12, 0)
    again = unpack(str(packed), str(tmp_path / "back"))
    assert (again.units_made, again.rewritten) == (0, 0)
    assert files_below(tmp_path / "back") == files_below(two_sets)


def test_a_subset_is_packed_and_comes_back_as_that_subset(two_sets: Path, tmp_path: Path) -> None:
    summary = pack(str(two_sets), str(tmp_path / "p"), targets=["coded"], num_views=1)
    assert (summary.targets, summary.num_views, summary.samples) == (["coded"], 1, 51)
    unpack(str(tmp_path / "p"), str(tmp_path / "back"))
    left_out = ("-v01", "asked/01", "/tiny/")
    kept = {name: data for name, data in files_below(two_sets).items() if not any(part in name for part in left_out)}
    back = files_below(tmp_path / "back")
    indices = {"index/views.idx", "index/targets/coded.idx"}  # of fewer units
    assert {n: d for n, d in back.items() if n not in indices} == {n: d for n, d in kept.items() if "index/" not in n}
    assert indices <= set(back)
    assert verify(str(tmp_path / "back"), full=True).findings == []
    with pytest.raises(ConfigError, match="no target set 'tiny'"):
        open_cache(tmp_path / "p")["tiny"]


def test_packing_twice_changes_nothing(two_sets: Path, pack_copy: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pack_copy.rglob("*.*") if path.name != ".lock"}
    assert pack(str(two_sets), str(pack_copy)).units_made == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    pack(str(two_sets), str(tmp_path / "other"))
    assert files_below(tmp_path / "other") == files_below(pack_copy)


@pytest.mark.parametrize("step", [1, 2, 5, 9, 10, 11, 12, 13, 14, 20])
def test_a_killed_pack_goes_on_and_is_never_read_half(
    two_sets: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out = tmp_path / "pack"
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            pack(str(two_sets), str(out))
    with pytest.raises(TecCacheError):
        batches(out, "coded")
    pack(str(two_sets), str(out))
    assert files_below(out) == files_below(packed)


def test_what_a_killed_pack_left_is_cleared(two_sets: Path, pack_copy: Path, packed: Path) -> None:
    unit = open_cache(two_sets).view_units[0]
    (pack_copy / layout.pack_payload(unit, "0" * 64)).write_bytes(b"of another attempt")
    (pack_copy / ".drafts").mkdir(exist_ok=True)
    (pack_copy / ".drafts" / ("0" * 32)).write_bytes(b"half")
    (pack_copy / "notes.tar").write_bytes(b"mine")
    pack(str(two_sets), str(pack_copy))
    assert (pack_copy / "notes.tar").read_bytes() == b"mine"
    (pack_copy / "notes.tar").unlink()
    assert files_below(pack_copy) == files_below(packed)


@pytest.mark.parametrize("step", [1, 4, 8, 10, 11, 12, 13, 14, 30])
def test_a_killed_unpacking_goes_on(
    two_sets: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            unpack(str(packed), str(tmp_path / "back"))
    unpack(str(packed), str(tmp_path / "back"))
    assert files_below(tmp_path / "back") == files_below(two_sets)


def parts_of_a_tar(pack: Path) -> Iterator[tuple[str, int]]:
    """Name places of what training reads of a sample: its crop, and its codes' CRCs and frames."""
    cache = open_cache(pack)
    assert isinstance(cache, Pack)
    views = cache.views_record(cache.view_units[0])
    codes = views.targets["coded"]
    yield "crop", views.offsets[3] + views.sizes[3] // 2
    yield "codes of", codes.offsets[3] + 3  # the magic
    yield "codes of", codes.offsets[3] + 4 + 1  # CRC of the crop
    yield "codes of", codes.offsets[3] + 8 + 13  # the first frame's length
    yield "codes of", codes.offsets[3] + 40
    yield "codes of", codes.offsets[3] + codes.sizes[3] - 1  # CRC of the last frame


@pytest.mark.parametrize("part", range(6))
def test_training_notices_every_damaged_part_it_reads(pack_copy: Path, part: int) -> None:
    cache = open_cache(pack_copy)
    payload = cache.views_record(cache.view_units[0]).payload
    assert payload is not None
    what, place = list(parts_of_a_tar(pack_copy))[part]
    flip(pack_copy / payload.name, place)
    with pytest.raises(CacheError, match=what) as caught:
        batches(pack_copy, "coded")
    assert payload.name in caught.value.where
    assert "row 3" in caught.value.where
    with pytest.raises(CacheError, match="SHA-256") as caught:
        unpack(str(pack_copy), str(pack_copy.parent / "back"))
    assert payload.name in caught.value.where


def test_damage_to_another_set_does_not_disturb_training(pack_copy: Path) -> None:
    cache = open_cache(pack_copy)
    assert isinstance(cache, Pack)
    views = cache.views_record(cache.view_units[0])
    assert views.payload is not None
    flip(pack_copy / views.payload.name, views.targets["tiny"].offsets[0] + 30)
    batches(pack_copy, "coded")
    with pytest.raises(CacheError, match="codes of"):
        batches(pack_copy, "tiny")


def test_missing_short_and_swapped_files_are_noticed(pack_copy: Path, packed: Path) -> None:
    cache = open_cache(packed)
    first, second = (cache.views_record(unit) for unit in cache.view_units[:3:2])
    assert first.payload is not None
    assert second.payload is not None
    ours, theirs = pack_copy / first.payload.name, pack_copy / second.payload.name
    whole = ours.read_bytes()
    for harm in ("gone", "short", "swapped"):
        if harm == "gone":
            ours.unlink()
        else:
            ours.write_bytes(whole[:-20_000] if harm == "short" else theirs.read_bytes())
        with pytest.raises(CacheError, match=r"gone|damaged") as caught:
            batches(pack_copy, "coded")
        assert first.payload.name in caught.value.where
        with pytest.raises(CacheError, match="damaged payload"):
            unpack(str(pack_copy), str(pack_copy.parent / harm))
    ours.write_bytes(whole)
    batches(pack_copy, "coded")
    record = pack_copy / layout.pack_record(cache.view_units[0])
    text = record.read_bytes()
    record.unlink()
    with pytest.raises(CacheError, match="units are missing") as caught:
        batches(pack_copy, "coded")
    assert "tec-cache pack" in caught.value.todo
    record.write_bytes((pack_copy / layout.pack_record(cache.view_units[2])).read_bytes())
    with pytest.raises(CacheError, match="the record of another unit"):
        batches(pack_copy, "coded")
    shutil.rmtree(pack_copy / "index")  # as many bytes as the index says: with it the record is not read
    record.write_bytes(text.replace(b'"count"', b'"cOunt"').replace(b'"keys"', b'"kEys"'))
    with pytest.raises(CacheError, match="damaged record"):
        batches(pack_copy, "coded")


def test_unpacking_notices_a_flip_of_any_bit(packed: Path, tmp_path: Path) -> None:
    """But for those of the index, which it does not use."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in packed.rglob("*") if path.is_file() and path.stat().st_size)
    files = [path for path in files if path.suffix != ".idx"]
    sizes = np.array([path.stat().st_size for path in files])
    chosen = [*rng.choice(len(files), 7), *rng.choice(len(files), 7, p=sizes / sizes.sum())]
    for number, index in enumerate(chosen):
        path = files[index]
        whole = path.read_bytes()
        flip(path, int(rng.integers(len(whole))), int(rng.integers(8)))
        try:
            with pytest.raises(CacheError) as caught:
                unpack(str(packed), str(tmp_path / f"back-{number}"))
        finally:
            path.write_bytes(whole)
        assert path.name.partition(".")[0] in caught.value.where


def test_another_release_may_write_other_bytes_of_the_same_values(
    two_sets: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another zstd, played by another level: the unit's record then names what was really written."""
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "ZSTD_LEVEL", 9)
        summary = unpack(str(packed), str(tmp_path / "back"))
    assert summary.rewritten >= 12
    assert files_below(tmp_path / "back") != files_below(two_sets)
    for name in ("tiny", "coded"):
        for a, b in zip(batches(tmp_path / "back", name), batches(two_sets, name), strict=True):
            assert codes_of(b)
            assert all(torch.equal(codes_of(a)[key], values) for key, values in codes_of(b).items())
    assert unpack(str(packed), str(tmp_path / "back")).units_made == 0


def test_codes_that_decode_to_other_values_are_refused(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decompressor that errs is noticed by the arrays' own hash, beyond all checksums of stored bytes."""
    from tec_cache.pack import reader

    def wrong(members: Any, specs: Any, **options: Any) -> dict[str, Any]:
        arrays = read(members, specs, **options)
        first = next(iter(arrays))
        arrays[first].reshape(-1)[0] += 1
        return arrays

    read = reader.read_members
    monkeypatch.setattr(reader, "read_members", wrong)
    with pytest.raises(CacheError, match="not those that were packed"):
        unpack(str(packed), str(tmp_path / "back"))


def test_what_is_not_meant_is_refused(
    two_sets: Path, packed: Path, pack_copy: Path, tmp_path: Path, shards: Path, tiny_base: Path
) -> None:
    other = tmp_path / "other"
    extract(tiny_config(shards, other, tiny_base, seed=5, views=1, limit=20))
    before = files_below(pack_copy)
    with pytest.raises(IdentityError) as caught:
        pack(str(other), str(pack_copy))
    assert "cache: stored" in str(caught.value)
    assert "num_views: stored 2, asked 1" in str(caught.value)
    with pytest.raises(IdentityError, match=r"targets\.tiny"):
        pack(str(two_sets), str(pack_copy), targets=["coded"])
    for out in (two_sets, other):
        with pytest.raises(ConfigError, match="a cache here, not a pack"):
            pack(str(two_sets), str(out))
    with pytest.raises(ConfigError, match="a pack already"):
        pack(str(pack_copy), str(tmp_path / "new"))
    with pytest.raises(ConfigError, match=r"no target set 'tinny' \(did you mean tiny\?\)"):
        pack(str(two_sets), str(tmp_path / "new"), targets=["tinny"])
    for views in (0, 3):
        with pytest.raises(ConfigError, match="the cache has 2 views"):
            pack(str(two_sets), str(tmp_path / "new"), num_views=views)
    with pytest.raises(ConfigError, match="this is a cache, not a pack"):
        unpack(str(two_sets), str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="a pack here, not a cache"):
        unpack(str(packed), str(pack_copy))
    with pytest.raises(IdentityError, match="seed"):
        unpack(str(packed), str(other))
    with pytest.raises(ConfigError, match="read only"):
        extract(tiny_config(shards, pack_copy, tiny_base))
    assert not (tmp_path / "new").exists()
    assert files_below(pack_copy) == before


def test_sets_that_webdataset_takes_for_one_are_refused() -> None:
    refuse_alike(["mae", "mae_large"])
    with pytest.raises(ConfigError, match="'mae' and 'MAE' cannot be told apart"):
        refuse_alike(["mae", "dino", "MAE"])


def test_an_unfinished_cache_is_not_packed(two_sets: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(two_sets, tmp_path / "c"))
    unit = open_cache(cache).view_units[-1]
    (cache / layout.target_record("coded", unit)).unlink()
    with pytest.raises(CacheError, match="units are missing"):
        pack(str(cache), str(tmp_path / "p"))
    assert not (tmp_path / "p").exists()
    assert pack(str(cache), str(tmp_path / "p"), targets=["tiny"]).units == 12


def test_damage_of_the_cache_is_not_packed(two_sets: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(two_sets, tmp_path / "c"))
    opened = open_cache(cache)
    record = opened["coded"].record(opened.view_units[0])
    assert record.payload is not None
    flip(cache / record.payload.name, record.blocks["gain"][0][0] + 2)
    with pytest.raises(CacheError, match="damaged targets"):
        pack(str(cache), str(tmp_path / "p"))
    assert open_store(tmp_path / "p").names(layout.PACK_RECORDS) == []


def test_both_ends_may_be_urls(two_sets: Path, packed: Path, tmp_path: Path) -> None:
    out, back = (f"memory://pack-{next(NUMBERS)}/{name}" for name in ("pack", "cache"))
    pack(str(two_sets), out)
    store = open_store(out)
    local = {name: data for name, data in files_below(packed).items() if name != ".lock"}
    assert {name: store.read(name) for name in store.names("")} == local
    cache = open_cache(out)
    assert isinstance(cache, Pack)
    loader = Loader(cache, cache["coded"], batch_size=16, pixel_sizes=(32, 24))
    ours = list(loader.batches(0, 3))
    for a, b in zip(ours, batches(two_sets, "coded")[:3], strict=True):
        assert torch.equal(a.codes["coded"]["features"], b.codes["coded"]["features"])
        assert torch.equal(a.pixels[32], b.pixels[32])
    unpack(out, back)
    store = open_store(back)
    original = {name: data for name, data in files_below(two_sets).items() if name != ".lock"}
    assert {name: store.read(name) for name in store.names("")} == original


def test_a_pack_record_holds_the_views_record(two_sets: Path, packed: Path) -> None:
    cache: Cache = open_cache(two_sets)
    for unit in cache.view_units:
        theirs, ours = cache.views_record(unit), PackRecord.read(open_store(packed), layout.pack_record(unit))
        assert (ours.keys, ours.labels, ours.crc32, ours.skipped, ours.photos_sha256, ours.notes) == (
            theirs.keys,
            theirs.labels,
            theirs.crc32,
            theirs.skipped,
            theirs.photos_sha256,
            theirs.notes,
        )
        assert ours.views == theirs.payload
        assert PackRecord.from_bytes(ours.to_bytes(), layout.pack_record(unit)) == ours


def test_the_commands(two_sets: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    out, back = str(tmp_path / "p"), str(tmp_path / "c")
    result = runner.invoke(cli.cli, ["pack", str(two_sets), out, "--target", "coded", "--views", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["targets"] == ["coded"]
    assert "1 view, target sets: coded" in runner.invoke(
        cli.cli, ["pack", str(two_sets), out, "--target", "coded", "--views", "1", "--quiet"]
    ).stdout  # fmt: skip
    result = runner.invoke(cli.cli, ["unpack", out, back, "--json"])
    assert json.loads(result.stdout)["units_made"] == 6
