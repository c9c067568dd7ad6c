"""The targets' files: standard Zarr for everybody, one range per array and block for the training."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import zarr
from zarr.storage import ZipStore

from tec_cache.cache import layout
from tec_cache.cache.blocks import read_block, write_zip
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.codec import ArraySpec
from tec_cache.errors import CacheError
from tec_cache.loader import Loader
from tec_cache.store.local import LocalStore
from tests.conftest import payload_of

FIRST = Unit(0, 0, 1)
STANDARD = {"transpose", "bytes", "blosc", "crc32c"}
SPECS = {
    "plain": ArraySpec((6,), "float16"),
    "turned": ArraySpec((4, 5), "int8", order=(2, 1, 0)),
    "whole": ArraySpec((3, 2), "int8", order=(1, 0, 2), shuffle="shuffle", split=64),
    "rows": ArraySpec((2,), "uint16", shuffle="noshuffle"),
    "zero": ArraySpec((2,), "int8"),
}


def arrays_of(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    found = {n: rng.integers(0, 100, (count, *s.shape)).astype(s.dtype) for n, s in SPECS.items()}
    return found | {"zero": np.zeros((count, 2), np.int8)}


def theirs(path: Path, name: str) -> np.ndarray:
    """Read an array of a zip with tensorstore."""
    inside = {"driver": "zip", "base": path.resolve().as_uri(), "path": f"{name}/"}
    return np.asarray(ts.open({"driver": "zarr3", "kvstore": inside}).result().read().result())


@pytest.mark.parametrize("count", [1, BLOCK_ROWS - 1, BLOCK_ROWS, 2 * BLOCK_ROWS + 5])
def test_our_reader_zarr_and_tensorstore_read_the_same(tmp_path: Path, count: int) -> None:
    path, arrays = tmp_path / "z.zip", arrays_of(count)
    blocks = write_zip(path, arrays, SPECS)
    data, group = path.read_bytes(), zarr.open_group(ZipStore(path, mode="r"), mode="r")
    assert set(group) == set(arrays) == set(blocks)
    for name, values in arrays.items():
        pieces = [(data[position : position + size], crc) for position, size, crc in blocks[name]]
        assert all(zlib.crc32(piece) == crc for piece, crc in pieces)
        ours = np.concatenate([read_block(piece, SPECS[name]) for piece, _ in pieces])[:count]
        for found in (ours, group[name][...], theirs(path, name)):
            assert found.dtype == values.dtype
            np.testing.assert_array_equal(found, values)


def test_only_standard_codecs_and_a_chunk_for_each_block(tmp_path: Path) -> None:
    path = tmp_path / "z.zip"
    blocks = write_zip(path, arrays_of(2 * BLOCK_ROWS + 5), SPECS)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        for name, spec in SPECS.items():
            metadata = json.loads(archive.read(f"{name}/zarr.json"))
            codecs = [codec["name"] for codec in metadata["codecs"]]
            assert codecs == [*(["transpose"] if spec.order else []), "bytes", "blosc", "crc32c"]
            assert set(codecs) <= STANDARD
            chunks = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            assert chunks == [BLOCK_ROWS, *spec.shape]
            members = [n for n in archive.namelist() if n.startswith(f"{name}/c/")]
            assert len(members) == len(blocks[name]) == 3, "an array of zeros is stored too: a gap is never legal"
            for number, (position, size, _) in enumerate(blocks[name]):
                member = archive.read(f"{name}/c/{number}" + "/0" * len(spec.shape))
                assert path.read_bytes()[position : position + size] == member


def test_the_same_arrays_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_zip(tmp_path / name, arrays_of(40), SPECS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_blocks_of_a_block_of_rows_lie_together(tmp_path: Path) -> None:
    """So that an object store gives all arrays of a block by one request."""
    blocks = write_zip(tmp_path / "z", arrays_of(3 * BLOCK_ROWS), SPECS)
    order = sorted((place[0], number) for places in blocks.values() for number, place in enumerate(places))
    assert [number for _, number in order] == sorted(number for _, number in order)


@pytest.mark.parametrize("quality", ["exact", "default"])
def test_others_read_the_units_of_a_cache(quality: str, request: pytest.FixtureRequest) -> None:
    cache = open_cache(request.getfixturevalue("made_cache" if quality == "exact" else "coded_cache"))
    tiny = cache["tiny"]
    for unit in (FIRST, Unit(2, 2, 0)):
        path, ours = payload_of(cache, unit, "tiny"), tiny.read_unit(tiny.record(unit))
        group = zarr.open_group(ZipStore(path, mode="r"), mode="r")
        assert set(group) == set(ours) == set(tiny.codec.arrays(tiny.spec))
        for name, values in ours.items():
            np.testing.assert_array_equal(group[name][...], values)
            np.testing.assert_array_equal(theirs(path, name), values)
            with zipfile.ZipFile(path) as archive:
                assert {c["name"] for c in json.loads(archive.read(f"{name}/zarr.json"))["codecs"]} <= STANDARD


class CountingStore(LocalStore):
    """Notes what is read of a cache."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.whole: list[str] = []
        self.ranges: list[tuple[str, tuple[int, int]]] = []

    def read(self, name: str) -> bytes:
        self.whole.append(name)
        return super().read(name)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.ranges += [(name, (int(offset), int(size))) for offset, size in ranges]
        return super().read_ranges(name, ranges)


@pytest.mark.parametrize("quality", ["exact", "default"])
@pytest.mark.parametrize("index", ["index", "no index"])
def test_training_reads_one_range_per_array_and_block_and_no_other_file(
    quality: str, index: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = Path(request.getfixturevalue("made_cache" if quality == "exact" else "coded_cache"))
    if index == "no index":
        path = Path(shutil.copytree(path, tmp_path / "c", ignore=shutil.ignore_patterns("index")))
    opened = open_cache(path)
    store = CountingStore(path)
    cache = Cache(store, opened.manifest)
    loader = Loader(cache, cache["tiny"], batch_size=32, pixel_sizes=(32,))
    list(loader.batches(0, loader.steps_per_epoch))
    units = [unit for unit in opened.view_units if unit.view == 0]
    expected: Counter[tuple[str, tuple[int, int]]] = Counter()
    for unit in units:
        views, targets = opened.views_record(unit), opened["tiny"].record(unit)
        assert views.payload is not None
        assert targets.payload is not None
        for blocks in targets.blocks.values():
            expected.update((targets.payload.name, (offset, size)) for offset, size, _ in blocks)
        for start in range(0, len(views.keys), BLOCK_ROWS):
            last = min(start + BLOCK_ROWS, len(views.keys)) - 1
            size = views.offsets[last] + views.sizes[last] - views.offsets[start]
            expected[views.payload.name, (views.offsets[start], size)] += 1
    of_index = Counter(name for name, _ in store.ranges if name.startswith("index/"))
    read = Counter((name, place) for name, place in store.ranges if not name.startswith("index/"))
    assert set(read) <= set(expected)
    assert max(read.values()) == 1
    assert len(read) >= len(expected) - 2 * 4, "but for the blocks of the rows of the left-out tail"
    codec = [layout.codec_record("tiny")]
    if quality != "exact":
        payload = opened["tiny"].codec_record.payload
        assert payload is not None
        codec.append(payload.name)
    records = [layout.views_record(u) for u in units] + [layout.target_record("tiny", u) for u in units]
    sources = [layout.source_record(shard) for shard in range(3)]
    sources += [layout.CONTENT_RECORD, *(layout.asked_record(view) for view in range(opened.num_views))]
    if index == "index":  # its beginning and its table, then the rows of each unit; no record of a unit or of photos
        files = (layout.views_index(), layout.target_index("tiny"))
        assert of_index == {name: 2 + len(units) for name in files}
        records, sources = [], [layout.CONTENT_RECORD]
    else:
        assert of_index == dict.fromkeys((layout.views_index(), layout.target_index("tiny")), 1), "looked for"
    assert Counter(store.whole) == Counter([layout.target_manifest("tiny"), *codec, *records, *sources])


def test_a_payload_under_the_name_of_another_is_refused(made_cache: Path, tmp_path: Path) -> None:
    """The name holds the hash, the record the name: a file of other content is noticed where it is read."""
    copied = Path(shutil.copytree(made_cache, tmp_path / "c"))
    cache, other = open_cache(copied), Unit(0, 1, 1)
    tiny = cache["tiny"]
    for target in (None, "tiny"):
        ours, theirs_ = payload_of(cache, FIRST, target), payload_of(cache, other, target)
        kept = ours.read_bytes()
        shutil.copy(theirs_, ours)
        views = cache.views_record(FIRST)
        with pytest.raises(CacheError, match="damaged") as error:
            tiny.read_unit(tiny.record(FIRST)) if target else cache.read_crops(views, range(len(views.keys)))
        assert str(ours) in error.value.where
        ours.write_bytes(kept)
        # a file that no record names is never looked at
        shutil.copy(theirs_, ours.with_name(ours.name.replace(ours.name.split(".")[2], "0" * 16)))
    tiny.read_unit(tiny.record(FIRST))


def test_names_are_the_first_digits_of_the_hash(made_cache: Path) -> None:
    payloads = [p for p in made_cache.rglob("*") if p.suffix in (".tar", ".zip", ".safetensors")]
    assert len(payloads) == 32
    for path in payloads:
        assert path.name.split(".")[-2] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
