"""The index of a cache: what readers do with it is what they do with the records, and it is never believed too far."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.extract import extract
from pipelines.index import index
from pipelines.info import info
from pipelines.pack import pack
from pipelines.remove import remove
from pipelines.unpack import unpack
from tec_cache.cache import layout
from tec_cache.cache.index.details import CROP
from tec_cache.cache.index.heading import ViewsHeading
from tec_cache.cache.index.table import ENTRY, PROLOGUE, read_table
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import PackRecord, TargetRecord, ViewsRecord
from tec_cache.errors import CacheError, ConfigError
from tec_cache.loader import Batch, Loader
from tec_cache.loader import units as loader_units
from tec_cache.loader.units import IndexedUnits, RecordedUnits
from tec_cache.progress import Progress
from tec_cache.rng import key64
from tec_cache.store import open_store
from tec_cache.store.local import LocalStore
from tests.conftest import files_below, tiny_config
from tests.sealing import reseal, unsealed

FIRST = Unit(0, 0, 0)
DOCUMENT = (Path(__file__).parent.parent / "docs" / "cache-format.md").read_text()


@pytest.fixture
def cache(made_cache: Path, tmp_path: Path) -> Path:
    """A copy that keeps the times of files and folders, as an index is believed by them."""
    return Path(shutil.copytree(made_cache, tmp_path / "cache"))


@pytest.fixture(scope="module")
def packed(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "pack"
    pack(str(made_cache), str(out))
    return out


def without_index(path: Path, tmp_path: Path) -> Path:
    copied = Path(shutil.copytree(path, tmp_path / "without"))
    shutil.rmtree(copied / "index")
    return copied


def loader(path: Path, **changes: Any) -> Loader[Batch]:
    opened = open_cache(path)
    settings: dict[str, Any] = {"batch_size": 16, "pixel_sizes": (opened.size,), "seed": 3} | changes
    return Loader(opened, opened["tiny"], **settings)


def all_batches(path: Path) -> list[Batch]:
    """Batches of two epochs, one of each view."""
    ours = loader(path)
    return list(ours.batches(0, 2 * ours.steps_per_epoch))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.sample_keys.tolist() == b.sample_keys.tolist()
        for left, right in zip(a.tensors(), b.tensors(), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)


class Reads:
    """The names of the files that were read, sized or listed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[tuple[str, str]] = []
        for method in ("read", "read_ranges", "size", "names"):
            monkeypatch.setattr(LocalStore, method, self._noting(method, getattr(LocalStore, method)))

    def _noting(self, method: str, real: Any) -> Any:
        def call(store: LocalStore, name: str, *rest: Any) -> Any:
            self.names.append((method, name))
            return real(store, name, *rest)

        return call

    def of_units(self) -> list[str]:
        """Records of units whose content was read."""
        found = []
        for method, name in self.names:
            file = layout.file_of(name)
            if method in ("read", "read_ranges") and file is not None and file.kind in ("views", "targets", "packed"):
                found.append(name)
        return found


@pytest.mark.parametrize("kind", ["cache", "pack"])
def test_an_index_gives_the_batches_that_the_records_give(
    made_cache: Path, packed: Path, tmp_path: Path, kind: str
) -> None:
    path = made_cache if kind == "cache" else packed
    plain = without_index(path, tmp_path)
    assert isinstance(loader(path)._units, IndexedUnits)
    assert isinstance(loader(plain)._units, RecordedUnits)
    assert_same(all_batches(path), all_batches(plain))


@pytest.mark.parametrize("kind", ["cache", "pack"])
def test_neither_opening_nor_an_epoch_reads_a_record_of_a_unit(
    made_cache: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = made_cache if kind == "cache" else packed
    reads = Reads(monkeypatch)
    all_batches(path)
    info(str(path))
    assert reads.of_units() == []
    assert ("read_ranges", layout.views_index()) in reads.names


def test_without_an_index_a_second_epoch_of_a_view_reads_no_record(
    made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = loader(without_index(made_cache, tmp_path), num_views=1)
    reads = Reads(monkeypatch)
    list(ours.batches(0, ours.steps_per_epoch))
    assert reads.of_units() == [], "they were read when the loader was made"
    list(ours.batches(ours.steps_per_epoch, 3 * ours.steps_per_epoch))
    assert reads.of_units() == []


def test_opened_units_are_bounded_and_opened_again(made_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = all_batches(made_cache)
    monkeypatch.setattr(loader_units, "OPEN_BYTES", 1)
    ours = loader(made_cache, workers=3)
    small = list(ours.batches(0, 2 * ours.steps_per_epoch))
    assert_same(small, whole)
    assert len(ours._units._units) <= 1  # type: ignore[attr-defined]


def test_info_says_the_same_with_an_index_and_without(made_cache: Path, packed: Path, tmp_path: Path) -> None:
    for number, path in enumerate((made_cache, packed)):
        plain = without_index(path, tmp_path / str(number))
        ours, theirs = info(str(path)), info(str(plain))
        assert (ours.pop("index"), theirs.pop("index")) == ("whole", "absent")
        assert ours.pop("cache") != theirs.pop("cache")
        assert ours == theirs


def test_the_index_is_a_function_of_the_records(cache: Path, tmp_path: Path) -> None:
    """However a cache came about: extracted, indexed again, packed and unpacked."""
    before = files_below(cache / "index")
    assert set(before) == {"views.idx", "targets/tiny.idx"}
    summary = index(str(cache))
    assert files_below(cache / "index") == before
    assert summary.written == [layout.views_index(), layout.target_index("tiny")]
    assert (summary.num_views, summary.targets, summary.units) == (2, {"tiny": 2}, len(open_cache(cache).view_units))
    pack(str(cache), str(tmp_path / "pack"))
    unpack(str(tmp_path / "pack"), str(tmp_path / "back"))
    assert files_below(tmp_path / "back" / "index") == before


def test_an_unfinished_cache_has_no_index(shards: Path, tiny_base: Path, cache: Path) -> None:
    (cache / layout.views_record(FIRST)).unlink()
    with pytest.raises(CacheError, match="units are missing"):
        index(str(cache))
    shutil.rmtree(cache / "index")
    config = tiny_config(shards, cache, tiny_base, part="1/2")
    (cache / layout.views_record(Unit(1, 0, 0))).unlink()
    extract(config)
    assert not (cache / "index").exists() or not open_cache(cache).missing_units(2)


def test_a_cache_of_version_1_is_not_indexed() -> None:
    golden = Path(__file__).parent / "data" / "golden_cache_v1" / "cache"
    with pytest.raises(ConfigError, match="format version 1"):
        index(str(golden))
    assert not (golden / "index").exists()
    assert open_cache(golden).index is None


def every_bit(data: bytes, step: int) -> Iterator[bytes]:
    for place in range(0, len(data), step):
        yield data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]


def test_a_flipped_bit_of_an_index_is_never_believed(cache: Path) -> None:
    """Of prologue, table and heading at opening; of the details when the unit is opened: the records are read then."""
    whole = all_batches(cache)
    for name in (layout.views_index(), layout.target_index("tiny")):
        path = cache / name
        data = path.read_bytes()
        start = struct.unpack_from("<Q", data, 24)[0]
        for number, other in enumerate(every_bit(data, 89)):
            path.write_bytes(other)
            opened, place = open_cache(cache), number * 89
            found = opened.index if name == layout.views_index() else opened["tiny"].index
            assert (found is None) == (place < PROLOGUE or place >= start), place
            assert_same(all_batches(cache), whole)
        path.write_bytes(data)


@pytest.mark.parametrize("length", [0, 1, PROLOGUE - 1, PROLOGUE, 400, -1])
def test_a_short_index_is_not_used(cache: Path, length: int) -> None:
    path = cache / layout.views_index()
    path.write_bytes(path.read_bytes()[:length])
    opened = open_cache(cache)
    assert opened.index is None
    assert opened.index_problem
    assert info(str(cache))["index"] == opened.index_problem
    assert len(all_batches(cache)) == 12


def test_an_index_that_claims_terabytes_asks_for_no_memory(cache: Path) -> None:
    path = cache / layout.views_index()
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 16, 2**40)
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="make no sense"):
        read_table(open_store(cache), layout.views_index())


def test_the_index_of_another_cache_is_not_used(cache: Path, pair: Path) -> None:
    other = pair / "cache"
    shutil.copy(other / layout.views_index(), cache / layout.views_index())
    assert open_cache(cache).index is None
    assert open_cache(cache).index_problem == "of another cache"


@pytest.mark.parametrize("kind", ["views", "targets"])
def test_a_record_that_goes_is_noticed_when_the_cache_is_opened(cache: Path, kind: str) -> None:
    unit = Unit(2, 0, 1)
    name = layout.views_record(unit) if kind == "views" else layout.target_record("tiny", unit)
    (cache / name).unlink()
    opened = open_cache(cache)
    problem = opened.index_problem if kind == "views" else opened["tiny"].index_problem
    assert problem == f"records are gone: 1: {unit}"
    with pytest.raises(CacheError, match="units are missing"):
        loader(cache)


def test_a_record_that_comes_spoils_no_index(cache: Path, shards: Path, tiny_base: Path) -> None:
    """Views are added to a cache while others train on the ones that are there."""
    extract(tiny_config(shards, cache, None, views=3, views_only=True, part="1/2"))
    os.utime(cache / layout.views_index(), (1, 1))
    opened = open_cache(cache)
    assert opened.index is not None
    assert opened.index.heading.num_views in (2, 3)
    assert isinstance(loader(cache, num_views=2)._units, IndexedUnits)


class Blind(LocalStore):
    """A folder whose times say nothing, as on an object store."""

    def changed_after(self, name: str, folder: str) -> bool | None:
        """Say that nobody knows."""
        return None


@pytest.mark.parametrize("harm", ["gone", "other", "fewer"])
def test_where_times_say_nothing_each_unit_shows_whether_its_record_is_there(cache: Path, harm: str) -> None:
    unit = Unit(1, 0, 0)
    path = cache / layout.views_record(unit)
    if harm == "gone":
        path.unlink()
    elif harm == "other":
        reseal(path, unsealed(path) | {"later": "a field that a later program added"})
    else:
        body = unsealed(path)
        lists = {name: body[name][:-1] for name in ("keys", "labels", "offsets", "sizes", "crc32")}
        from tec_cache.cache.record import hash_keys

        reseal(path, body | lists | {"keys_sha256": hash_keys(lists["keys"])})
    opened = open_cache(cache)
    blind = Cache(Blind(cache), opened.manifest)
    ours = Loader(blind, (), batch_size=16, pixel_sizes=(32,), seed=3)
    assert isinstance(ours._units, IndexedUnits)
    if harm == "other":
        assert_same(list(ours.batches(0, 6)), all_without_targets(cache))
        return
    with pytest.raises(CacheError, match="damaged record" if harm == "gone" else "the index says"):
        list(ours.batches(0, 6))


def all_without_targets(path: Path) -> list[Batch]:
    opened = open_cache(path)
    return list(Loader(opened, (), batch_size=16, pixel_sizes=(32,), seed=3).batches(0, 6))


def test_what_is_made_again_is_indexed_again(cache: Path, shards: Path, tiny_base: Path) -> None:
    """A unit that somebody dropped by hand, and that an extraction makes again."""
    before = files_below(cache)
    (cache / layout.views_record(FIRST)).unlink()
    (cache / layout.target_record("tiny", FIRST)).unlink()
    extract(tiny_config(shards, cache, tiny_base))
    assert files_below(cache) == before
    assert open_cache(cache).index is not None


def test_an_index_goes_with_what_it_is_of(cache: Path) -> None:
    remove(str(cache), views=1)
    opened = open_cache(cache)
    assert opened.index is not None
    assert (opened.index.heading.num_views, opened.num_views) == (1, 1)
    remove(str(cache), target="tiny")
    assert not (cache / layout.target_index("tiny")).exists()
    assert open_cache(cache).index is not None


def test_an_index_holds_what_the_records_hold(made_cache: Path, packed: Path) -> None:
    for path in (made_cache, packed):
        opened = open_cache(path)
        target, views = opened["tiny"], opened.index
        assert views is not None
        assert target.index is not None
        assert [views.unit(number) for number in range(len(views))] == opened.view_units
        for number, unit in enumerate(opened.view_units):
            record = opened.views_record(unit)
            details = views.details(views.find(unit), CROP)
            assert views.find(unit) == number
            assert views.payload(number) == record.payload
            shard = opened.shards[unit.shard]
            assert details["sample_key"].tolist() == [key64("sample", shard, key) for key in record.keys]
            assert details["label"].tolist() == [-1 if x is None else x for x in record.labels]
            for name, values in (("offset", record.offsets), ("size", record.sizes), ("crc32", record.crc32)):
                assert details[name].tolist() == list(values)
            entry = views.entries[number]
            assert (entry["rows"], entry["skipped"]) == (len(record.keys), len(record.skipped))
            kind = PackRecord if opened.packed else ViewsRecord
            name = layout.pack_record(unit) if opened.packed else layout.views_record(unit)
            assert entry["record_bytes"] == (path / name).stat().st_size
            assert kind.read(opened.store, name).to_bytes() == (path / name).read_bytes()
            coded: TargetRecord = target.record(unit)
            place = target.index.entries[target.index.find(unit)]
            assert place["rows"] == coded.count
            assert place["views_sha256"].tobytes().hex() == coded.views_sha256


def test_the_document_describes_the_file(made_cache: Path) -> None:
    """A reader made from docs/cache-format.md alone, by positions: prologue, entries and details."""
    data = (made_cache / "index" / "views.idx").read_bytes()
    magic, version, size, count, table, heading, end = struct.unpack_from("<8sIIQQQQ", data)
    assert (magic, version, size, end) == (b"TECINDEX", 1, ENTRY.itemsize, len(data))
    about = json.loads(data[heading:])
    assert ViewsHeading.read(data[heading:]).groups == about["groups"]
    position = 80
    for number in range(count):
        entry = data[table + number * size : table + (number + 1) * size]
        shard, group, view, rows = struct.unpack_from("<IIII", entry)
        record = json.loads((made_cache / layout.views_record(Unit(shard, group, view))).read_bytes())["body"]
        crops = [struct.unpack_from("<QqQII", data, position + 32 * row) for row in range(rows)]
        assert [crop[2:] for crop in crops] == list(
            zip(record["offsets"], record["sizes"], record["crc32"], strict=True)
        )
        assert entry[40:72].hex() == record["payload"]["sha256"]
        position += 32 * rows
    assert position == table
    names = list(ENTRY.names or ())
    assert all(f"`{name}`" in DOCUMENT for name in (*names, *(CROP.names or ()), *about)), "every field is described"
    assert np.dtype(ENTRY).itemsize == 104


def test_writing_counts_units(cache: Path) -> None:
    from tec_cache.cache.index.writing import refresh

    with Progress("index", quiet=True) as progress:
        assert refresh(open_cache(cache), progress) == []
        assert progress.done == 0
        refresh(open_cache(cache), progress, anew=True)
        assert progress.done == 2 * len(open_cache(cache).view_units)
