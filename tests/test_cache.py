"""The cache on disk: read by others' readers, and every damage noticed where it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import torch
import webdataset as wds
import zarr

from tec_cache.base.load import load_base
from tec_cache.cache.identity import differences, fingerprint
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.pixels import decode_crop
from tec_cache.cache.reader import open_cache
from tec_cache.cache.record import create_once, hash_keys
from tec_cache.cache.writer import write_zarr
from tec_cache.errors import CacheError, ConfigError
from tec_cache.targets import normalize_targets

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
        tar = wds.WebDataset(str(cache.layout.views(unit)), shardshuffle=False, empty_check=False)
        crops = [sample["jpg"] for sample in tar]
        pixels = torch.from_numpy(np.stack([decode_crop(c) for c in crops])).permute(0, 3, 1, 2) / 255
        images = (pixels - torch.tensor(base.mean)[:, None, None]) / torch.tensor(base.std)[:, None, None]
        expected = normalize_targets(base(images), "patch")
        arrays = {n: torch.from_numpy(np.asarray(a[...])) for n, a in tiny.open(unit).items()}
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
    samples = list(wds.WebDataset(str(cache.layout.views(FIRST)), shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == [f"{key}-v01" for key in record.keys]
    assert [int(s["cls"]) for s in samples] == record.labels
    assert [s["jpg"] for s in samples] == cache.read_crops(FIRST, record, range(len(samples)))
    assert hash_keys(record.keys) == record.keys_sha256


def test_tensorstore_reads_the_targets(made_cache: Path) -> None:
    cache = open_cache(made_cache)
    arrays = cache["tiny"].open(FIRST)
    folder = cache.layout.targets("tiny", FIRST)
    for name, array in arrays.items():
        store = {"driver": "file", "path": str(folder / name)}
        theirs = ts.open({"driver": "zarr3", "kvstore": store}).result().read().result()
        np.testing.assert_array_equal(np.asarray(theirs), array[...])


def test_inner_chunks_are_blocks_and_codecs_are_standard(tmp_path: Path) -> None:
    values = np.arange((2 * BLOCK_ROWS + 5) * 6, dtype=np.float16).reshape(-1, 6)
    write_zarr(tmp_path / "z", {"a": values, "zero": np.zeros((4, 2), np.int8)})
    array = zarr.open_group(tmp_path / "z", mode="r")["a"]
    np.testing.assert_array_equal(array[...], values)
    assert array.chunks == (BLOCK_ROWS, 6)
    metadata = json.loads((tmp_path / "z" / "a" / "zarr.json").read_text())
    (sharding,) = metadata["codecs"]
    names = [c["name"] for c in sharding["configuration"]["codecs"]]
    assert (sharding["name"], names) == ("sharding_indexed", ["bytes", "blosc", "crc32c"])
    assert (tmp_path / "z" / "zero" / "c").is_dir(), "an array of zeros is stored too, so a gap is never legal"


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_of_targets_or_crops_is_noticed(cache_copy: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = open_cache(cache_copy)
    kind = ["views", "targets"][seed % 2]
    if kind == "views":
        path = cache.layout.views(FIRST)
        record = cache.views_record(FIRST)
        row = int(rng.integers(len(record.keys)))
        position = record.offsets[row] + int(rng.integers(record.sizes[row]))
    else:
        payload = sorted(
            p for p in cache.layout.targets("tiny", FIRST).rglob("*") if p.is_file() and p.suffix != ".json"
        )
        path = payload[seed % len(payload)]
        position = int(rng.integers(path.stat().st_size))
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"damaged|gone"):
        read_everything(cache_copy)


def read_everything(path: Path) -> None:
    cache = open_cache(path)
    record = cache.views_record(FIRST)
    cache.read_crops(FIRST, record, range(len(record.keys)))
    tiny = cache["tiny"]
    tiny.read(tiny.open(FIRST), 0, len(record.keys), FIRST)


@pytest.mark.parametrize(
    "harm",
    ["truncate tar", "remove tar", "truncate zarr", "remove zarr", "swap units", "swap records", "foreign record",
     "broken record", "broken manifest", "edited manifest", "other version"],
)  # fmt: skip
def test_harm_is_noticed(cache_copy: Path, harm: str) -> None:
    cache = open_cache(cache_copy)
    layout, other = cache.layout, Unit(1, 0, 1)
    tar, folder = layout.views(FIRST), layout.targets("tiny", FIRST)
    features = next(p for p in (folder / "features").rglob("*") if p.is_file() and p.suffix != ".json")
    if harm == "truncate tar":
        tar.write_bytes(tar.read_bytes()[:2000])
    elif harm == "remove tar":
        tar.unlink()
    elif harm == "truncate zarr":
        features.write_bytes(features.read_bytes()[:-1])
    elif harm == "remove zarr":
        shutil.rmtree(folder)
    elif harm == "swap units":
        shutil.rmtree(folder)
        shutil.copytree(layout.targets("tiny", other), folder)
    elif harm == "swap records":
        shutil.copy(layout.target_record("tiny", other), layout.target_record("tiny", FIRST))
    elif harm == "foreign record":
        record = json.loads(layout.views_record(FIRST).read_text())
        layout.views_record(FIRST).write_text(json.dumps(record | {"identity": "0" * 64}))
    elif harm == "broken record":
        layout.views_record(FIRST).write_text('{"keys": [')
    elif harm == "broken manifest":
        layout.manifest.write_text("")
    elif harm == "edited manifest":
        layout.manifest.write_text(layout.manifest.read_text().replace('"quality": 90', '"quality": 91'))
    elif harm == "other version":
        layout.manifest.write_text(layout.manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CacheError):
        read_everything(cache_copy)


def test_what_has_no_record_is_not_there(cache_copy: Path) -> None:
    cache = open_cache(cache_copy)
    cache.require_complete(2, "tiny")
    cache.layout.target_record("tiny", FIRST).unlink()
    fresh = open_cache(cache_copy)
    assert fresh.missing_units(2, "tiny") == [FIRST]
    with pytest.raises(CacheError, match=r"units are missing, 1: 000000\.000-v01") as error:
        fresh.require_complete(2, "tiny")
    assert error.value.exit_code == 3
    cache.layout.source_record(2).unlink()
    assert len(open_cache(cache_copy).missing_units(2)) == 1


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


def test_create_once_keeps_the_first(tmp_path: Path) -> None:
    assert create_once(tmp_path / "x", b"one")
    assert not create_once(tmp_path / "x", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"one"
