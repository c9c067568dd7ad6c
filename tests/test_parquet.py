"""Photos in parquet files: the photos and labels that tars of them give, from a disk and from URLs, damaged or not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

import cli
import pipelines.extraction.make_views
from pipelines.extract import extract
from pipelines.finetune import finetune
from pipelines.probe import probe
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.config import ProbeConfig
from tec_cache.data import parquet as parquet_module
from tec_cache.data import parquet_table
from tec_cache.data.photos import Extent, Photo
from tec_cache.data.source import Source, open_source
from tec_cache.errors import ConfigError, IdentityError, LayoutError, SourceError, StorageError
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.labelled import PhotoReader, evaluation_transform, index_photos
from tests.conftest import encoded, files_below, photo, tiny_config, write_shards
from tests.s3_server import S3Server, s3_server
from tests.web_server import web_server

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["tench, Tinca tinca", "goldfish", "shark", "ray"]
NUMBERS = count()


def features(**columns: list[str]) -> dict[str, str]:
    """Metadata as the hub's library writes them: column -> names of its classes."""
    about: dict[str, Any] = {name: {"names": names, "_type": "ClassLabel"} for name, names in columns.items()}
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, **about}}})}


def rows(*numbers: int, path: str | None = "p{:05d}.jpg") -> list[dict[str, Any]]:
    return [{"bytes": encoded(photo(i)), "path": path and path.format(i)} for i in numbers]


def write(
    path: Path, images: list[Any], labels: list[Any] | None = None, *, metadata: dict[str, str] | None = None,
    group: int = 4, image: str = "image", label: str = "label", more: dict[str, Any] | None = None, **options: Any,
) -> Path:  # fmt: skip
    """Write a table of photos in row groups of `group`."""
    columns: dict[str, Any] = {image: pa.array(images, IMAGE)}
    if labels is not None:
        columns[label] = pa.array(labels)
    table = pa.table(columns | (more or {})).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, **options)
    return path


def write_tables(folder: Path, counts: list[int], *, start: int = 0, **options: Any) -> Path:
    """Write the photos that `write_shards` writes into tars."""
    number = start
    for shard, size in enumerate(counts):
        numbers = range(number, number + size)
        write(folder / f"shard-{shard:06d}.parquet", rows(*numbers), [i % 4 for i in numbers], **options)
        number += size
    return folder


def read(place: Path | str, **options: Any) -> list[Photo]:
    return [item for shard in open_source(str(place), **options).shards for item in shard.photos()]


def labels_of(source: Source) -> list[int | None]:
    return [item.label for shard in source.shards for item in shard.photos()]


def remarks(place: Path, **options: Any) -> str:
    return " ".join(open_source(str(place), **options).with_labels().remarks)


# ---- the same as tars -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos of `shards`: 40, 24 and 33."""
    return write_tables(tmp_path_factory.mktemp("tables"), [40, 24, 33])


def content(cache: Cache) -> list[tuple[Unit, list[str], list[int | None], list[bytes]]]:
    every = []
    for unit in cache.view_units:
        record = cache.views_record(unit)
        crops = list(cache.read_crops(record, range(len(record.keys))))
        every.append((unit, list(record.keys), list(record.labels), crops))
    return every


def test_a_cache_from_parquet_is_that_from_tars(tables: Path, shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"views": 1, "crop": "center"}  # which depends on no name
    for place, out in ((tables, "a"), (shards, "b")):
        assert extract(tiny_config(place, tmp_path / out, tiny_base, **how)).missing == 0
    ours, theirs = open_cache(tmp_path / "a"), open_cache(tmp_path / "b")
    assert content(ours) == content(theirs)
    for unit in ours["tiny"].units:
        one, other = (cache["tiny"].read_unit(cache["tiny"].record(unit)) for cache in (ours, theirs))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert [shard["name"] for shard in ours.identity["source"]["shards"]] == [
        f"shard-{i:06d}.parquet" for i in range(3)
    ]


def test_it_has_the_identity_of_its_bytes_wherever_it_lies(tables: Path, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "shard-000000.parquet"
    path.parent.mkdir()
    path.write_bytes((tables / path.name).read_bytes())
    (here,), there = open_source(str(path)).shards, open_source(str(tables)).shards[0]
    assert here.identity() == there.identity()
    assert (here.size, here.name) == (path.stat().st_size, path.name)
    assert list(here.photos()) == list(there.photos())


KILLED = 77


def test_killed_and_started_again_it_ends_with_the_same_bytes(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (tiny_config(tables, tmp_path / name, None, views_only=True) for name in ("whole", "cut"))
    extract(whole)
    real, done = pipelines.extraction.make_views.commit_views, count(1)

    def commit(*args: Any, **options: Any) -> Any:
        if next(done) == 6:
            os._exit(KILLED)
        return real(*args, **options)

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(pipelines.extraction.make_views, "commit_views", commit)
            extract(cut)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    assert len(open_cache(tmp_path / "cut").view_units) == 5
    summary = extract(cut)
    assert (summary.missing, summary.views_made) == (0, 2 * 97 - 2 * 16 - 2 * 16 - 8)
    assert files_below(tmp_path / "cut") == files_below(tmp_path / "whole")


def test_a_file_that_was_exchanged_is_refused(tables: Path, tmp_path: Path) -> None:
    write_tables(tmp_path / "in", [5])
    config = tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True)
    extract(config)
    write_tables(tmp_path / "in", [5], start=50)
    with pytest.raises(IdentityError, match=r"shard-000000\.parquet has changed"):
        extract(config)


# ---- keys -------------------------------------------------------------------------------------------------------


def test_a_key_is_the_path_where_that_is_plain_and_new_else_the_row(tmp_path: Path) -> None:
    paths = ["a/b.c.JPEG", "x", None, "a/b.c.png", "", "/home/me/y.jpg", "../z.jpg", "C:\\w.jpg", "http://h/v.jpg",
             "t-000010.jpg", "new\nline.jpg", "u" * 300, "x.jpg", "é.jpg", ".jpg", "d/.png"]  # fmt: skip
    images = [{"bytes": b"1", "path": path} for path in paths]
    found = [item.key for item in read(write(tmp_path / "t.parquet", images))]
    plain = {0: "a/b.c", 1: "x", 13: "é", 15: "d/.png"}
    assert found == [plain.get(i, f"t-{i:06d}") for i in range(len(paths))]
    assert len(set(found)) == len(found)


def test_paths_that_are_no_text_and_photos_without_any(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.large_binary())])
    pq.write_table(pa.table({"photo": pa.array([{"bytes": b"1"}], kind)}), tmp_path / "t.parquet")
    assert [item.key for item in read(tmp_path / "t.parquet")] == ["t-000000"]
    path = write(tmp_path / "u.parquet", [{"bytes": b"1", "path": "abc"}], compression="none", use_dictionary=False,
                 write_statistics=False)  # fmt: skip
    path.write_bytes(path.read_bytes().replace(b"\3\0\0\0abc", b"\3\0\0\0a\xffc"))
    assert [item.key for item in read(path)] == ["u-000000"]


# ---- labels -----------------------------------------------------------------------------------------------------


def test_names_of_classes_are_those_of_the_metadata(tmp_path: Path) -> None:
    images = rows(*range(6))
    path = write(tmp_path / "a.parquet", images, [3, 0, 0, -1, 4, None], metadata=features(label=NAMES))
    source = open_source(str(path)).with_labels()
    assert source.classes == tuple(NAMES)
    assert source.remarks == ()
    assert source.label_field is None
    assert labels_of(source) == [3, 0, 0, None, None, None]
    notes = [item.note for shard in source.shards for item in shard.photos()]
    assert notes == ["", "", "", "", "its label 4 is none of the 4 classes that its file names", ""]
    summary = extract(tiny_config(path, tmp_path / "c", None, views_only=True))
    assert summary.photos == 6
    cache = open_cache(tmp_path / "c")
    assert cache.identity["classes"] == NAMES
    assert extract(tiny_config(path, tmp_path / "c", None, views_only=True, views=3)).missing == 0
    # in another order of the user's, and unread as numbers
    other = open_source(str(path), classes=("ray", "tench, Tinca tinca"))
    assert labels_of(other) == [0, 1, 1, None, None, None]
    assert labels_of(open_source(str(path))) == [3, 0, 0, None, None, None]


def test_files_that_number_their_classes_otherwise_are_brought_together_by_name(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", rows(0, 1), [0, 1], metadata=features(label=["cat", "dog"]))
    write(tmp_path / "in" / "b.parquet", rows(2, 3), [0, 1], metadata=features(label=["dog", "cat"]))
    assert labels_of(open_source(str(tmp_path / "in")).with_labels()) == [0, 1, 1, 0]


@pytest.mark.parametrize("text", ["{", "[]", '{"info": {"features": [1]}}', '{"info": {"features": {"label": 3}}}',
                                  '{"info": {"features": {"label": {"names": ["a", "a"]}}}}',
                                  '{"info": {"features": {"label": {"names": ["a", 3]}}}}',
                                  '{"info": {"features": {"label": {"names": []}}}}', "[" * 100_000])  # fmt: skip
def test_metadata_of_any_kind_leave_numbers(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.parquet", rows(0, 1), [1, 0], metadata={"huggingface": text})
    source = open_source(str(path)).with_labels()
    assert (source.classes, labels_of(source)) == (None, [1, 0])


def test_names_as_labels_are_collected_from_all_files_and_sorted(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", rows(0, 1), ["dog", "cat"])
    write(tmp_path / "in" / "b.parquet", rows(2, 3), pa.array(["ant", None]).dictionary_encode())
    source = open_source(str(tmp_path / "in")).with_labels()
    assert source.classes == ("ant", "cat", "dog")
    assert labels_of(source) == [2, 1, 0, None]


def test_values_that_are_no_labels_leave_the_photo_and_a_note(tmp_path: Path) -> None:
    for number, values in enumerate(([[1, 2]], [0.5], [True], [{"a": 1}], [b"\xff\xfe\0"])):
        (found,) = read(write(tmp_path / f"{number}.parquet", rows(0), values))
        assert (found.label, found.problem) == (None, "")
        assert "its label" in found.note


def test_which_column_is_which(tmp_path: Path) -> None:
    def found(name: str, *args: Any, field: str | None = None, **options: Any) -> list[int | None]:
        path = write(tmp_path / f"{name}.parquet", rows(0, 1), *args, **options)
        return labels_of(open_source(str(path), label_field=field))

    assert found("cifar", [1, 2], image="img", label="labels") == [1, 2]
    both = {"fine": [3, 4], "coarse": [5, 6]}
    assert found("class label", None, more={"x": [1, 1], "fine": [3, 4]}, metadata=features(fine=NAMES)) == [3, None]
    assert found("label first", [1, 2], more=both, metadata=features(fine=NAMES)) == [1, 2]
    assert found("named", None, field="coarse", more=both) == [5, 6]
    assert found("two photos", [1, 2], more={"depth": pa.array(rows(5, 6), IMAGE)}) == [1, 2]
    assert found("none", None, more=both) == [None, None]
    text = remarks(tmp_path / "none.parquet")
    assert "looked for a column label, cls" in text
    assert "the photos have 2: coarse, fine; --label-field" in text
    assert "looked for a column coarse" in remarks(
        write(tmp_path / "nulls.parquet", rows(0), None, more={"coarse": pa.array([None], pa.int64())}),
        label_field="coarse",
    )
    for wrong, options in (
        (r"each of 2: fine, coarse may hold the labels; its columns are 3: image", {"metadata": features(**{
            "fine": NAMES, "coarse": NAMES[:2]})}),
        (r"no column 'coarser' for the labels; its columns are 3: image \(struct", {"field": "coarser"}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=wrong) as caught:
            found("wrong", None, more=both, **options)  # type: ignore[arg-type]
        assert "--label-field" in caught.value.todo


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"text": ["a"], "label": [1]}, r"no photos in it; its columns are 2: text \(string\), label \(int64\)"),
        ({"image": [b"bytes"]}, r"no photos in it; its columns are 1: image \(binary\)"),
        ({"image": pa.array([[{"bytes": b"1", "path": "x"}]], pa.list_(IMAGE))}, "no photos in it"),
        ({"left": pa.array(rows(0), IMAGE), "right": pa.array(rows(1), IMAGE)}, "each of 2: left, right may hold"),
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_wrong_columns_are_refused_and_listed(
    tmp_path: Path, columns: dict[str, Any], what: str, on_error: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=what) as caught:
        extract(tiny_config(tmp_path, tmp_path / "c", None, views_only=True, on_error=on_error))
    assert caught.value.where == str(tmp_path / "a.parquet")
    assert "struct<bytes: binary, path: string>" in caught.value.todo


# ---- what is broken ---------------------------------------------------------------------------------------------


def test_photos_without_bytes_are_broken_ones(tmp_path: Path) -> None:
    images = [*rows(0), None, {"bytes": None, "path": "/somewhere/x.jpg"}, {"bytes": b"", "path": "e.jpg"}, *rows(4)]
    path = write(tmp_path / "a.parquet", images, list(range(5)))
    found = read(path)
    assert [item.problem for item in found] == [
        "", "its bytes are not in the file", "its bytes are not in the file, only a path", "", "",
    ]  # fmt: skip
    assert [item.label for item in found] == list(range(5))
    with pytest.raises(SourceError, match="photo 'a-000001': its bytes are not in the file"):
        extract(tiny_config(path, tmp_path / "c", None, views_only=True))
    summary = extract(tiny_config(path, tmp_path / "c", None, views_only=True, on_error="skip"))
    assert summary.photos == 2
    record = open_cache(tmp_path / "c").views_record(Unit(0, 0, 0))
    assert list(record.keys) == ["p00000", "p00004"]
    assert [key for key, _ in record.skipped] == ["a-000001", "a-000002", "e"]
    # as files of a folder, single ones are not looked at before they are read
    index = index_photos(open_source(str(path)).with_labels())
    assert [index.read(i) for i in (0, 3, 4)] == [found[i].data for i in (0, 3, 4)]
    for i in (1, 2):
        with pytest.raises(SourceError, match="bytes are not in the file"):
            index.read(i)


def changed(path: Path, start: int, text: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[start : start + len(text)] = text
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "no footer", "footer of noise"])
def test_what_is_no_whole_parquet_file_is_damage(tmp_path: Path, kind: str) -> None:
    write_tables(tmp_path / "in", [6, 5, 4])
    path = tmp_path / "in" / "shard-000001.parquet"
    data = path.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    noise = np.random.default_rng(0).bytes(size)
    path.write_bytes(
        {"empty": b"", "text": b"hello" * 100, "cut": data[: len(data) // 2], "no footer": data[:-size],
         "footer of noise": data[: -size - 8] + noise + data[-8:]}[kind]
    )  # fmt: skip
    with pytest.raises(SourceError, match="damaged shard: ") as caught:
        extract(tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True))
    assert caught.value.where == str(path)
    assert "--on-error skip" in caught.value.todo
    summary = extract(tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, on_error="skip"))
    assert (summary.photos, summary.missing) == (10, 0)
    assert "damaged shard" in open_cache(tmp_path / "c").source_record(1).damage  # type: ignore[union-attr]
    # nor does it keep the first file from saying the names of the classes
    write(tmp_path / "in" / "shard-000002.parquet", rows(0), [2], metadata=features(label=NAMES))
    (tmp_path / "in" / "shard-000000.parquet").write_bytes(path.read_bytes())
    assert open_source(str(tmp_path / "in")).with_labels().classes == tuple(NAMES)


def test_what_comes_before_a_damage_is_used(tmp_path: Path) -> None:
    path = write_tables(tmp_path / "in", [12], write_page_checksum=True) / "shard-000000.parquet"
    begin = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    changed(path, begin + 200, b"\0" * 40)  # in the middle of the first photo of the second group
    shard, keys = open_source(str(path)).shards[0], []
    with pytest.raises(SourceError, match=r"damaged shard: .*(CRC|corrupt)"):
        keys.extend(item.key for item in shard.photos())
    assert keys == [f"p{i:05d}" for i in range(4)]
    summary = extract(tiny_config(path, tmp_path / "c", None, views_only=True, on_error="skip", group_size=4))
    assert summary.photos == 4
    # photos of the other groups are read by themselves all the same
    index = index_photos(open_source(str(path)).with_labels())
    assert len(index) == 12
    assert index.read(11) == encoded(photo(11))
    with pytest.raises(SourceError, match="damaged shard"):
        index.read(5)


@pytest.mark.parametrize("seed", range(3))
def test_no_bytes_of_a_file_do_more_than_damage(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = write(tmp_path / "a.parquet", rows(*range(6)), list(range(6)), write_page_checksum=True)
    data = whole.read_bytes()
    expected = {item.key: item.data for item in read(whole)}
    for _ in range(60):
        text = bytearray(data)
        start = int(rng.integers(len(data) - 800, len(data) - 8) if rng.random() < 0.5 else rng.integers(len(data)))
        noise = rng.bytes(int(rng.integers(1, 9)))
        text[start : start + len(noise)] = noise
        whole.write_bytes(text)
        try:
            found = read(whole)
        except (SourceError, ConfigError, MemoryError):
            continue
        assert all(isinstance(item.data, bytes) for item in found)
        assert len(found) <= len(expected) * 1000


def test_a_file_without_rows_holds_no_photos(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no photos"):
        read(write(tmp_path / "a.parquet", [], pa.array([], pa.int64())))


def test_a_dictionary_of_few_photos_for_many_rows_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"bytes": np.random.default_rng(0).bytes(100_000), "path": None}
    path = write(tmp_path / "a.parquet", [one] * 2000, group=2000)
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(parquet_table, "MOST_TOGETHER", 2_000_000)
    table = parquet_table.Table(open_source(str(path)).shards[0].file, None)  # type: ignore[attr-defined]
    assert table._rows_together(0) < 20
    assert sum(item.data == one["bytes"] for item in read(path)) == 2000


def test_without_pyarrow_it_says_what_to_install(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="read by pyarrow") as caught:
        open_source(str(tables))
    assert caught.value.todo == "pip install 'tec-cache[parquet]'"


# ---- where files lie --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("{}/shard-{{000000..000002}}.parquet", [0, 1, 2]),
        ("{}/shard-{{000002,000000}}.parquet", [2, 0]),
        ("{}/shard-*.parquet", [0, 1, 2]),
        ("{}/shard-00000[12].parquet", [1, 2]),
        ("{}", [0, 1, 2]),
        ("file://{}/shard-000001.parquet", [1]),
    ],
)
def test_files_are_found_in_order(tables: Path, pattern: str, found: list[int]) -> None:
    shards = open_source(pattern.format(tables)).shards
    assert [shard.name for shard in shards] == [f"shard-{i:06d}.parquet" for i in found]
    assert [len(list(shard.photos())) for shard in shards] == [[40, 24, 33][i] for i in found]


def test_parts_of_a_data_set_are_not_mixed(tmp_path: Path) -> None:
    for number, part in enumerate(["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]):
        write(tmp_path / "data" / f"{part}.parquet", rows(number), [number])
    for source in (tmp_path / "data", f"{tmp_path}/data/*.parquet"):
        with pytest.raises(LayoutError, match="parts of a data set lie here together") as caught:
            open_source(str(source))
        assert f"'{tmp_path}/data/train-*.parquet'" in caught.value.todo
    assert labels_of(open_source(f"{tmp_path}/data/train-*.parquet")) == [0, 1]
    assert labels_of(open_source(f"{tmp_path}/data/{{train,validation}}-*.parquet")) == [0, 1, 2]
    with pytest.raises(SourceError, match="neither photos nor tars nor parquet files") as missing:
        open_source(str(tmp_path))
    assert f"'{tmp_path}/data/*.parquet'" in missing.value.todo


def test_files_of_two_kinds_are_no_one_input(tables: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="tars and parquet files lie here together"):
        open_source(f"{{{tables}/shard-000000.parquet,{shards}/shard-000000.tar}}")
    write_tables(tmp_path, [1])
    (tmp_path / "README.md").write_text("words")
    assert open_source(str(tmp_path)).passed_over == {".md files": 1}
    # a folder of tars may have captions beside each
    write_shards(tmp_path, [1])
    source = open_source(str(tmp_path))
    assert [shard.name for shard in source.shards] == ["shard-000000.tar"]
    assert source.passed_over == {".md files": 1, ".parquet files": 1}


def test_a_table_of_captions_beside_photos_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.jpg").write_bytes(encoded(photo(0)))
    pq.write_table(pa.table({"file_name": ["cat/0.jpg"], "text": ["a cat"]}), tmp_path / "metadata.parquet")
    source = open_source(str(tmp_path))
    assert (source.classes, source.passed_over) == (("cat",), {".parquet files": 1})


class OtherFileSystem(MemoryFileSystem):
    """What another package brings to fsspec."""

    protocol = "tectest"
    store: dict[str, Any] = {}  # noqa: RUF012  # fsspec's own, which is not to be shared
    pseudo_dirs = [""]  # noqa: RUF012


class HubFile(AbstractBufferedFile):
    """A file that reads ahead, as the hub's do."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.asked.append(end - start)
        data: bytes = self.fs.store[self.path].getvalue()[start:end]
        return data


class HubFileSystem(OtherFileSystem):
    """Stands for the hub's, whose paths begin with `datasets/`."""

    protocol = "hf"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    asked: list[int] = []  # noqa: RUF012
    cat_file = AbstractFileSystem.cat_file

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return HubFile(self, path, mode, **options) if mode == "rb" else super()._open(path, mode, **options)


@pytest.fixture(params=[OtherFileSystem, HubFileSystem], ids=["any", "hf"])
def remote(request: pytest.FixtureRequest) -> Iterator[str]:
    """A folder behind the URL of a file system that is registered by another package."""
    kind = request.param
    before = dict(_registry)
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
    try:
        yield f"{kind.protocol}://datasets/me/set-{next(NUMBERS)}@refs%2Fconvert%2Fparquet/data"
    finally:
        _registry.clear()
        _registry.update(before)
        kind.store.clear()


def put(url: str, folder: Path) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    for file in sorted(folder.iterdir()):
        fs.pipe_file(f"{path}/{file.name}", file.read_bytes())


def test_tars_and_parquet_of_the_hub(remote: str, tables: Path, shards: Path, tmp_path: Path) -> None:
    put(remote, tables)
    put(remote, shards)
    for pattern in ("shard-{000000..000002}", "shard-*"):
        both = [open_source(f"{remote}/{pattern}.{kind}") for kind in ("tar", "parquet")]
        for source, kind in zip(both, ("tar", "parquet"), strict=True):
            assert [shard.name for shard in source.shards] == [f"shard-{i:06d}.{kind}" for i in range(3)]
            assert all(shard.place == f"{remote}/{shard.name}" for shard in source.shards)
        found = [[(item.key, item.label, item.data) for s in source.shards for item in s.photos()] for source in both]
        assert found[0] == found[1]
        assert len(found[0]) == 97
    local, far = open_source(str(tables)).shards, open_source(f"{remote}/*.parquet").shards
    assert [shard.identity() for shard in local] == [shard.identity() for shard in far]
    for kind, out in (("tar", "a"), ("parquet", "b")):
        config = tiny_config(None, tmp_path / out, None, views_only=True, input=f"{remote}/shard-000000.{kind}",
                             size=32, grid=4, views=1, crop="center")  # fmt: skip
        assert extract(config).photos == 40
    ours, theirs = (content(open_cache(tmp_path / out)) for out in "ab")
    assert ours == theirs
    with pytest.raises(SourceError, match=r"did you mean .*shard-000000\.parquet"):
        open_source(f"{remote}/shard-00000.parquet")
    with pytest.raises(SourceError, match="a folder") as caught:
        open_source(remote)
    assert f"{remote}/*.parquet" in caught.value.todo


@pytest.mark.parametrize("remote", [HubFileSystem], indirect=True, ids=["hf"])
def test_the_hub_is_asked_for_little_more_than_is_read(remote: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [{"bytes": rng.bytes(50_000), "path": f"{i}.jpg"} for i in range(40)]
    size = write(tmp_path / "a.parquet", images, [0] * 40, group=20).stat().st_size
    put(remote, tmp_path)
    source = open_source(f"{remote}/a.parquet")
    for most, look in ((0.1 * size, source.with_labels), (1.1 * size, lambda: list(source.shards[0].photos()))):
        del HubFileSystem.asked[:]
        look()
        assert 0 < sum(HubFileSystem.asked) < most


def test_only_what_is_wanted_is_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [{"bytes": rng.bytes(50_000), "path": f"{i}.jpg"} for i in range(40)]
    path = write(tmp_path / "a.parquet", images, [i % 4 for i in range(40)], group=20)
    with web_server(tmp_path) as server:
        source = open_source(server.url(path.name))
        assert [item.label for item in source.shards[0].photos()] == [i % 4 for i in range(40)]
        del server.asked[:]
        source.with_labels()
        assert sum(asked.size for asked in server.asked) < path.stat().st_size / 10, "the photos stay where they are"
        server.ranges = False
        with pytest.raises(ConfigError, match="gives no parts of a file") as caught:
            read(server.url(path.name))
        assert "simplecache::" in caught.value.todo
        assert len(read(f"simplecache::{server.url(path.name)}")) == 40
        server.ranges = True
        (shard,) = open_source(server.url(path.name)).shards
        server.broken.add(path.name)
        with pytest.raises(StorageError, match="cannot be read"):
            list(shard.photos())


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3")) as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.create_bucket("photos")
        yield server


def test_a_cache_from_an_object_store_is_that_from_a_disk(s3: S3Server, tables: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    for file in tables.iterdir():
        fs.pipe_file(f"photos/tables/{file.name}", file.read_bytes())
    fs.invalidate_cache()
    sizes: dict[str, Any] = {"views_only": True, "views": 2, "size": 32, "grid": 4, "group_size": 16}
    for place, out in ((str(tables), "a"), ("s3://photos/tables/shard-*.parquet", "b")):
        assert extract(tiny_config(None, tmp_path / out, None, input=place, **sizes)).photos == 97
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


# ---- single photos ----------------------------------------------------------------------------------------------

CENTER = evaluation_transform(16, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def test_single_photos_are_those_of_reading_in_order(tables: Path) -> None:
    source = open_source(str(tables)).with_labels()
    index, every = index_photos(source), [(s, item) for s in source.shards for item in s.photos()]
    assert index.keys == [item.key for _, item in every]
    assert index.label.tolist() == [item.label for _, item in every]
    assert [index.place(i) for i in range(97)] == [shard.place for shard, _ in every]
    for i in np.random.default_rng(0).permutation(97):
        assert index.read(int(i)) == every[i][1].data
    with pytest.raises(SourceError, match="the shard has changed"):
        index.homes[0].read("x", Extent(40, -1))


def test_batches_do_not_depend_on_the_processes_that_make_them(tables: Path, shards: Path) -> None:
    def batches(place: Path, workers: int) -> list[tuple[list[int], list[int], bytes]]:
        index = index_photos(open_source(str(place)).with_labels())
        index.read(0)  # this process has the file open
        reader = PhotoReader(index, CENTER, batch_size=12, seed=5, workers=workers)
        return [(b.numbers.tolist(), b.labels.tolist(), b.images.numpy().tobytes()) for b in reader.batches(0, 4)]

    assert batches(tables, 0) == batches(tables, 2) == batches(shards, 0)


def test_large_groups_and_files_that_are_far_away_are_held_in_memory(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: str
) -> None:
    near = index_photos(open_source(str(tables)).with_labels())
    put(remote, tables)
    far = index_photos(open_source(f"{remote}/*.parquet").with_labels())
    monkeypatch.setattr(parquet_module, "MOST_GROUP", 1000)
    large = index_photos(open_source(str(tables)).with_labels())
    for index in (far, large):
        assert index.keys == near.keys
        assert [index.read(i) for i in range(97)] == [near.read(i) for i in range(97)]
    monkeypatch.setattr("tec_cache.labelled.index.MOST_UNPACKED", 1000)
    for place, why in ((str(tables), "whose row groups have up to"), (f"{remote}/*.parquet", "row groups")):
        with pytest.raises(ConfigError, match=f"in a random order.*{why}.*held in memory") as caught:
            index_photos(open_source(place).with_labels(), on_error="skip")
        assert "row_group_size" in caught.value.todo
    monkeypatch.setattr(parquet_module, "MOST_GROUP", 1 << 30)
    with pytest.raises(ConfigError, match="which is not on a disk"):
        index_photos(open_source(f"{remote}/*.parquet").with_labels())


def test_a_file_that_changed_or_is_gone_is_told_apart(tmp_path: Path) -> None:
    path = write_tables(tmp_path, [6]) / "shard-000000.parquet"
    index = index_photos(open_source(str(tmp_path)).with_labels())
    write_tables(tmp_path, [5])
    with pytest.raises(SourceError, match="the shard has changed"):
        index.read(0)
    path.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        index.read(0)


def test_finetune_and_probe_take_them(tiny_base: Path, tmp_path: Path, shards: Path) -> None:
    write_tables(tmp_path / "train", [24, 16], metadata=features(label=NAMES))
    write_tables(tmp_path / "test", [13], start=100, metadata=features(label=NAMES[::-1]))
    scores = probe(
        ProbeConfig(model=str(tiny_base), train=str(tmp_path / "train"), test=f"{tmp_path}/test/*.parquet",
                    grid=4, device="cpu")
    )  # fmt: skip
    assert (scores.train_images, scores.test_images, scores.skipped) == (40, 13, 0)
    assert scores.class_names == NAMES
    summary = finetune(
        FinetuneConfig(model=str(tiny_base), train=str(tmp_path / "train"), test=str(tmp_path / "test"),
                       out=str(tmp_path / "run"), recipe="small", epochs=1, batch_size=8, device="cpu", threads=1,
                       workers=1, save_minutes=0.0)
    )  # fmt: skip
    assert (summary.train_images, summary.test_images, summary.classes) == (40, 13, 4)


def test_masks_are_refused_before_anything_is_read(tables: Path) -> None:
    with pytest.raises(ConfigError, match="masks are not read from parquet"):
        open_source(str(tables)).with_masks()


# ---- the command line -------------------------------------------------------------------------------------------


def test_plan_limit_and_label_field(
    tables: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tec-cache", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out + err

    more = ["--cache", tmp_path / "c", "--views", 1, "--size", 32, "--grid", 4, "--workers", 1]
    code, text = told("extract", f"{tables}/*.parquet", *more, "--views-only", "--limit", 45, "--label-field", "label")
    assert code == 0, text
    assert "4 (in the field label), labels are numbers from 0 to 3" in text.replace("\n", " ")
    assert open_cache(tmp_path / "c").identity["source"]["limit"] == 45
    code, text = told("extract", f"{tables}/*.parquet", *more, "--views-only", "--label-field", "laber")
    assert code == 2
    assert "no column 'laber'" in text
