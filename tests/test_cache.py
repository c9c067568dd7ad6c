"""The cache on disk: read by others' readers, and every damage noticed where it is read."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

from tec_cache.base.load import load_base
from tec_cache.cache import layout
from tec_cache.cache.identity import differences, fingerprint
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.pixels import decode_crop
from tec_cache.cache.record import hash_keys
from tec_cache.cache.sealed import MIDDLE, TAIL, seal
from tec_cache.errors import CacheError, ConfigError
from tec_cache.targets import normalize_targets
from tests.conftest import payload_of
from tests.sealing import reseal, unsealed

FIRST = Unit(0, 0, 1)


@pytest.fixture
def cache_copy(made_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_cache, tmp_path / "cache"))


def test_what_is_stored_is_what_the_base_says_of_the_stored_pixels(made_cache: Path, tiny_base: Path) -> None:
    """Computed here from the tar alone, in one batch of another size, without the project's writer or loader."""
    cache = open_cache(made_cache)
    base = load_base(str(tiny_base), grid=4, k=3)
    tiny = cache["tiny"]
    for unit in cache.view_units[:4]:
        tar = wds.WebDataset(str(payload_of(cache, unit)), shardshuffle=False, empty_check=False)
        crops = [sample["jpg"] for sample in tar]
        pixels = torch.from_numpy(np.stack([decode_crop(c) for c in crops])).permute(0, 3, 1, 2) / 255
        images = (pixels - torch.tensor(base.mean)[:, None, None]) / torch.tensor(base.std)[:, None, None]
        expected = normalize_targets(base(images), "patch")
        arrays = {n: torch.from_numpy(np.array(a)) for n, a in tiny.read_unit(tiny.record(unit)).items()}
        arrays["rows"] = arrays["rows"].to(torch.int32)
        stored = tiny.decode(arrays)
        assert torch.equal(stored.rows, expected.rows)
        torch.testing.assert_close(stored.features, expected.features, rtol=1e-3, atol=1e-3)
        assert stored.attention is not None
        assert expected.attention is not None
        torch.testing.assert_close(stored.attention.softmax(-1), expected.attention.softmax(-1), rtol=5e-3, atol=1e-5)


def test_crops_are_plain_webdataset_with_labels(made_cache: Path) -> None:
    cache = open_cache(made_cache)
    record = cache.views_record(FIRST)
    samples = list(wds.WebDataset(str(payload_of(cache, FIRST)), shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == [f"{key}-v01" for key in record.keys]
    assert [int(s["cls"]) for s in samples] == record.labels
    assert [s["jpg"] for s in samples] == cache.read_crops(record, range(len(samples)))
    assert hash_keys(record.keys) == record.keys_sha256


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_of_targets_or_crops_is_noticed(cache_copy: Path, seed: int) -> None:
    """Of what a training run reads: whole blocks of targets, their checksums included, and JPEGs."""
    rng = np.random.default_rng(seed)
    cache = open_cache(cache_copy)
    if seed % 2:
        path = payload_of(cache, FIRST, "tiny")
        blocks = [block for array in cache["tiny"].record(FIRST).blocks.values() for block in array]
        offset, size, _ = blocks[seed // 2 % len(blocks)]
    else:
        path, record = payload_of(cache, FIRST), cache.views_record(FIRST)
        row = int(rng.integers(len(record.keys)))
        offset, size = record.offsets[row], record.sizes[row]
    data = bytearray(path.read_bytes())
    data[offset + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    with pytest.raises(CacheError, match="damaged") as error:
        read_everything(cache_copy)
    assert str(path) in error.value.where


def read_everything(path: Path) -> None:
    cache = open_cache(path)
    record = cache.views_record(FIRST)
    cache.read_crops(record, range(len(record.keys)))
    tiny = cache["tiny"]
    tiny.read_unit(tiny.record(FIRST))


def resealed(path: Path, **changes: object) -> None:
    """Change a sealed record so that only its meaning is wrong."""
    reseal(path, unsealed(path) | changes)


HARMS = {
    "truncate tar": "damaged",
    "remove tar": "are gone",
    "swap tars": "damaged",
    "truncate zip": "damaged",
    "remove zip": "are gone",
    "swap zips": "damaged",
    "swap target records": "another unit",
    "swap view records": "another unit",
    "swap both records": "another unit",
    "remove view record": "damaged record",
    "foreign record": "another cache",
    "foreign target record": "another target set",
    "targets of other keys": "other crops",
    "targets of other crops": "other crops",
    "views of other photos": "other photos",
    "broken record": "damaged record",
    "record without a field": "missing required field",
    "broken manifest": "damaged manifest",
    "edited manifest": "damaged manifest",
    "other version": "format version 4, this program reads 3",
}


@pytest.mark.parametrize("harm", HARMS)
def test_harm_is_noticed(cache_copy: Path, harm: str) -> None:
    cache = open_cache(cache_copy)
    other = Unit(1, 0, 1)
    tar, archive = payload_of(cache, FIRST), payload_of(cache, FIRST, "tiny")
    record, target_record = (cache_copy / n for n in (layout.views_record(FIRST), layout.target_record("tiny", FIRST)))
    manifest = cache_copy / layout.MANIFEST
    kind, _, what = harm.partition(" ")
    if kind == "truncate":
        path = tar if what == "tar" else archive
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "remove":
        {"tar": tar, "zip": archive, "view record": record}[what].unlink()
    elif harm == "swap tars":
        shutil.copy(payload_of(cache, other), tar)
    elif harm == "swap zips":
        shutil.copy(payload_of(cache, other, "tiny"), archive)
    elif kind == "swap":
        for path, theirs in (
            (record, layout.views_record(other)),
            (target_record, layout.target_record("tiny", other)),
        ):
            if what == "both records" or ("target" in what) == (path == target_record):
                shutil.copy(cache_copy / theirs, path)
    elif harm == "foreign record":
        resealed(record, identity="0" * 64)
    elif harm == "foreign target record":
        resealed(target_record, identity="0" * 64)
    elif harm == "targets of other keys":
        resealed(target_record, keys_sha256="0" * 64)
    elif harm == "targets of other crops":
        resealed(target_record, views_sha256="0" * 64)
    elif harm == "views of other photos":
        resealed(record, photos_sha256="0f" * 32)
    elif harm == "broken record":
        record.write_text('{"keys": [')
    elif harm == "record without a field":
        body = unsealed(record)
        del body["notes"]
        reseal(record, body)
    elif harm == "broken manifest":
        manifest.write_text("")
    elif harm == "edited manifest":
        manifest.write_text(manifest.read_text().replace('"quality": 90', '"quality": 91'))
    elif harm == "other version":
        text = seal("cache", unsealed(manifest), indent=1)[:-78].replace(b'"format":3', b'"format":4')
        manifest.write_bytes(text + MIDDLE + hashlib.sha256(text).hexdigest().encode() + TAIL)
    with pytest.raises(CacheError, match=HARMS[harm]) as error:
        read_everything(cache_copy)
    assert error.value.where.startswith(str(cache_copy))
    assert error.value.todo


def test_what_has_no_record_is_not_there(cache_copy: Path) -> None:
    cache = open_cache(cache_copy)
    cache.require_complete(2, "tiny")
    (cache_copy / layout.target_record("tiny", FIRST)).unlink()
    fresh = open_cache(cache_copy)
    assert fresh.missing_units(2, "tiny") == [FIRST]
    with pytest.raises(CacheError, match=r"units are missing, 1: 000000\.000-v01") as error:
        fresh.require_complete(2, "tiny")
    assert error.value.exit_code == 3
    (cache_copy / layout.source_record(2)).unlink()
    assert len(open_cache(cache_copy).missing_units(2)) == 1


def test_source_records_of_two_shards_cannot_change_places(cache_copy: Path) -> None:
    shutil.copy(cache_copy / layout.source_record(0), cache_copy / layout.source_record(1))
    with pytest.raises(CacheError, match="another source shard"):
        open_cache(cache_copy).missing_units(2)


def test_unknown_target_set_names_what_there_is(made_cache: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean tiny"):
        open_cache(made_cache)["tinny"]
    with pytest.raises(ConfigError, match="no cache"):
        open_cache(made_cache / "views")


def test_differences_name_nested_fields() -> None:
    stored = {"views": {"size": 224, "flip": 0.5}, "grid": 14}
    asked = {"views": {"size": 196, "flip": 0.5}, "grid": 14, "new": 1}
    assert differences(stored, asked) == ["new: stored null, asked 1", "views.size: stored 224, asked 196"]
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
