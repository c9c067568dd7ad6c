"""Members of tars as samples: grouped as WebDataset groups them, never half of one, and all that is none is counted."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.extract import extract
from pipelines.info import info
from tec_cache.cache.opening import open_cache
from tec_cache.data import samples as grouping
from tec_cache.data.passed_over import PassedOver
from tec_cache.data.photos import Photo
from tec_cache.data.source import open_source
from tec_cache.errors import LayoutError, SourceError
from tests.conftest import encoded, files_below, photo, tiny_config, write_tar

JPEG = encoded(photo(0))
Members = list[tuple[str, bytes]]


def read(path: Path | str) -> tuple[list[Photo], dict[str, int]]:
    """Return the photos of a shard, and what was passed over."""
    (shard,) = open_source(str(path)).shards
    counts = PassedOver()
    photos = list(shard.photos(counts))
    return photos, counts.told()


def keys_and_labels(photos: Sequence[Photo]) -> dict[str, int | None]:
    assert all(item.data and not item.problem for item in photos)
    assert len({item.key for item in photos}) == len(photos)
    return {item.key: item.label for item in photos}


def special(path: Path, *infos: tuple[str, bytes, str], members: Members) -> Path:
    """Write a tar whose members are followed by others: (name, type, name that it links to)."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind, target in infos:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


# ---- what is one sample --------------------------------------------------------------------------------------

GROUPED: dict[str, tuple[list[str], dict[str, int | None]]] = {
    "plain": (["a.jpg", "a.cls", "b.cls", "b.jpg"], {"a": 1, "b": 2}),
    "named fields": (["a.input.jpg", "a.meta.json", "a.output.cls", "b.input.jpg", "b.output.cls"], {"a": 2, "b": 4}),
    "named image alone": (["a.input.jpg", "b.input.jpg"], {"a": None, "b": None}),
    "named image, plain label": (["a.rgb.png", "a.cls"], {"a": 1}),
    "folders in keys": (["x/a.jpg", "x/a.cls", "y/a.jpg", "z.z/a.jpg"], {"x/a": 1, "y/a": None, "z.z/a": None}),
    "suffixes in any case": (["a.JPG", "a.CLS", "b.Input.Jpeg", "b.Output.Cls"], {"a": 1, "b": 3}),
    "a mask beside a photo": (["a.jpg", "a.seg.png", "a.cls"], {"a": 2}),
    "a labelled photo beside a photo": (["a.jpg", "a.5_x.jpg", "a.5_x.cls"], {"a": None}),
    "a photo with further fields": (["a.cls", "a.depth.npy", "a.jpg", "a.json", "a.txt"], {"a": 0}),
    "dots in names": (["n.5_x.jpg", "n.5_x.cls", "n.6_y.jpg", "n.6_y.cls"], {"n.5_x": 1, "n.6_y": 3}),
    "dots in names, apart": (["n.5.jpg", "m.jpg", "n.6.jpg"], {"n": None, "m": None, "n.6": None}),
    "numbers for names": (["img.001.jpg", "img.002.jpg"], {"img.001": None, "img.002": None}),
    "documents": (["dataset.json", "a.jpg", "a.cls", "classes.txt"], {"a": 2}),
    "between a photo and its label": (["a.jpg", "README", "__meta__", ".DS_Store", "a.cls"], {"a": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPED)
def test_members_are_grouped(tmp_path: Path, name: str) -> None:
    names, expected = GROUPED[name]
    path = write_tar(
        tmp_path / "0.tar", [(n, JPEG if n[-3:].lower() != "cls" else b"%d" % i) for i, n in enumerate(names)]
    )
    assert keys_and_labels(read(path)[0]) == expected


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a.left.jpg", "a.right.jpg", "a.cls"], "more than one image (left.jpg, right.jpg)"),
        (["a.image.jpg", "a.mask.png"], "more than one image (image.jpg, mask.png)"),
        (["a.jpg", "a.png", "a.cls"], "more than one image (jpg, png)"),
        (["a.cls"], "no image among its fields (cls)"),
        (["a.output.cls", "a.heic", "a.cls"], "no image among its fields (cls, heic, output.cls)"),
    ],
)
def test_samples_that_cannot_be_meant_are_broken_photos(tmp_path: Path, names: list[str], problem: str) -> None:
    members = [(n, b"3" if n.endswith("cls") else JPEG) for n in ["0.jpg", "0.cls", *names, "z.jpg", "z.cls"]]
    photos, _ = read(write_tar(tmp_path / "0.tar", members))
    assert [(item.key, item.problem) for item in photos] == [("0", ""), ("a", problem), ("z", "")]


def test_a_label_in_json_without_its_photo_is_a_broken_photo(tmp_path: Path) -> None:
    photos, counts = read(
        write_tar(tmp_path / "0.tar", [("a.json", b'{"label": 3}'), ("b.jpg", JPEG), ("c.json", b"{}")])
    )
    assert [(item.key, item.problem) for item in photos] == [("a", "no image among its fields (json)"), ("b", "")]
    assert counts == {".json files": 1}


PASSED_OVER: dict[str, tuple[list[str], dict[str, int]]] = {
    "hidden": ([".DS_Store", "x/.ipynb_checkpoints/0.jpg", "__MACOSX/x/._0.jpg", "x/._0.jpg"], {"hidden": 4}),
    "metadata": (["__key__", "__info__/0.jpg"], {"metadata of WebDataset": 2}),
    "no suffix": (["LICENSE", "x/Makefile"], {"files without a suffix": 2}),
    "documents": (["data.json", "x/classes.txt", "index.html"], {".html files": 1, ".json files": 1, ".txt files": 1}),
    "other photos": (["0.heic", "1.CR2"], {".cr2 files": 1, ".heic files": 1}),
    "masks": (["a.mask.png", "a.1.jpg"], {"images beside a sample's own": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSED_OVER)
def test_what_is_no_photo_is_passed_over_and_counted(tmp_path: Path, name: str) -> None:
    others, counts = PASSED_OVER[name]
    members = [("a.jpg", JPEG), ("a.cls", b"1"), *((other, JPEG) for other in others)]
    members = sorted(members, key=lambda member: not member[0].startswith("a."))
    photos, passed_over = read(write_tar(tmp_path / "0.tar", members))
    assert photos == [Photo("a", JPEG, 1)]
    assert passed_over == counts


def test_a_dot_and_two_dots_are_no_hidden_names(tmp_path: Path) -> None:
    assert keys_and_labels(read(write_tar(tmp_path / "0.tar", [("./a.jpg", JPEG), ("../b.jpg", JPEG)]))[0]) == {
        "./a": None,
        "../b": None,
    }


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 10**6))
def test_photos_and_labels_are_those_that_webdataset_finds(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    members: Members = []
    for number in range(rng.randrange(1, 8)):
        key = rng.choice(["", "d/", "d.e/f/"]) + rng.choice("xyz") + f"{number}"
        image = rng.choice(["jpg", "JPEG", "input.png", "image.jpg"])
        extra = {rng.choice(["cls", "output.cls"]): b"%d" % number, "json": b"{}", "depth.npy": b"0", "seg.txt": b"s"}
        fields = [(image, JPEG), *rng.sample(sorted(extra.items()), rng.randrange(len(extra) + 1))]
        rng.shuffle(fields)
        members += [(f"{key}.{field}", data) for field, data in fields]
        members += rng.sample([("README", b"r"), (".hidden.jpg", JPEG), ("__meta__", b"m")], rng.randrange(3))
    path = write_tar(tmp_path_factory.mktemp("any") / "0.tar", members)
    expected = {}
    for sample in wds.WebDataset(str(path), shardshuffle=False):
        label = next((int(data) for field, data in sample.items() if field.rpartition(".")[2] == "cls"), None)
        expected[sample["__key__"]] = label
    assert keys_and_labels(read(path)[0]) == expected


# ---- members that lie apart ----------------------------------------------------------------------------------


def pairs(count: int, key: str = "{:04d}") -> tuple[Members, Members]:
    return [(key.format(i) + ".jpg", JPEG) for i in range(count)], [
        (key.format(i) + ".cls", b"1") for i in range(count)
    ]


def orders(count: int) -> dict[str, Members]:
    photos, labels = pairs(count)
    dotted, dotted_labels = pairs(count, "img.{:04d}")
    classes = pairs(count, "{:04d}.5_x"), pairs(count, "{:04d}.6_y")
    mixed = [*photos, *labels]
    random.Random(0).shuffle(mixed)
    json = [(name.replace("cls", "json"), b'{"label": 1}') for name, _ in labels]
    return {
        "photos first": photos + labels,
        "labels first": labels + photos,
        "backwards": photos + labels[::-1],
        "shuffled": mixed,
        "the last label alone": [m for pair in zip(photos[:-1], labels[:-1], strict=True) for m in pair]
        + [photos[-1], ("x.jpg", JPEG), labels[-1]],
        "labels in json": photos + json,
        "dotted, photos first": dotted + dotted_labels,
        "two photos of a key": classes[0][0] + classes[0][1] + classes[1][0] + classes[1][1],
        "labels in another folder": [(f"images/{n}", d) for n, d in photos] + [(f"labels/{n}", d) for n, d in labels],
        "labels in an earlier folder": [(f"a/{n}", d) for n, d in labels] + [(f"b/{n}", d) for n, d in photos],
    }


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("name", orders(1))
def test_members_apart_are_refused_and_nothing_wrong_is_committed(tmp_path: Path, name: str, on_error: str) -> None:
    photos, labels = pairs(3, "good{}")
    write_tar(tmp_path / "in/0.tar", sorted([*photos, *labels]))  # the first shard tells what labels are
    path = write_tar(tmp_path / "in/1.tar", orders(40)[name])  # more than two groups of 16
    config = tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, on_error=on_error)
    with pytest.raises(LayoutError, match=r"do not lie side by side|lie in different folders") as caught:
        extract(config)
    assert (caught.value.where, caught.value.exit_code) == (str(path), 1)
    assert "pack" in caught.value.todo
    cache = open_cache(tmp_path / "c")
    records = cache.views_records(cache.view_units)
    assert {label for record in records for label in record.labels} == {1}, "no photo without its label"
    assert not any(record.skipped for record in records)
    assert cache.source_record(1) is None


def test_the_remedy_helps(tmp_path: Path) -> None:
    for name, members in orders(20).items():
        if "folder" not in name:
            path = write_tar(tmp_path / f"{name}.tar", sorted(members))
            assert set(keys_and_labels(read(path)[0]).values()) <= {1, None}


@pytest.mark.parametrize("kind", ["tar.gz", "remote"])
def test_members_apart_where_headers_cannot_be_jumped_to(tmp_path: Path, kind: str) -> None:
    data = write_tar(tmp_path / "0.tar", orders(40)["photos first"]).read_bytes()
    fs = fsspec.filesystem("memory")
    try:
        if kind == "remote":
            fs.pipe_file("/apart/0.tar", data)
            place = "memory://apart/0.tar"
        else:
            (tmp_path / "1.tar.gz").write_bytes(gzip.compress(data))
            place = str(tmp_path / "1.tar.gz")
        (shard,) = open_source(place).shards
        given = []
        with pytest.raises(LayoutError, match="do not lie side by side"):
            given.extend(shard.photos())
        assert given == [], "it is noticed before a photo is given"
    finally:
        if fs.exists("/apart"):
            fs.rm("/apart", recursive=True)


def test_photos_without_labels_are_read_although_other_things_lie_in_other_folders(tmp_path: Path) -> None:
    members = [("images/0.jpg", JPEG), ("boxes/0.json", b'{"boxes": []}'), ("boxes/0.txt", b"0 0 1 1")]
    photos, counts = read(write_tar(tmp_path / "0.tar", members))
    assert keys_and_labels(photos) == {"images/0": None}
    assert counts == {".json files": 1, ".txt files": 1}


def test_shards_whose_names_all_begin_the_same_are_read_a_part_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (8, 9, 10):
        monkeypatch.setattr(grouping, "LONG_RUN", size)
        monkeypatch.setattr(grouping, "LONGEST_RUN", 40)
        names = [f"img.{i:04d}.{field}" for i in range(100) for field in ("cls", "jpg", "json")]
        data = {"cls": b"1", "jpg": JPEG, "json": b"{}"}
        path = write_tar(tmp_path / "0.tar", [(name, data[name.rpartition(".")[2]]) for name in names])
        assert keys_and_labels(read(path)[0]) == {f"img.{i:04d}": 1 for i in range(100)}
    words = [(f"img.{a}{b}.jpg", JPEG) for a in "abcdefgh" for b in "abcdefgh"]
    with pytest.raises(LayoutError, match="share the key 'img'"):
        read(write_tar(tmp_path / "1.tar", words))


# ---- links, devices, tars in tars ----------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_hard_links_are_photos(tmp_path: Path, compressed: bool) -> None:
    members = [("blobs/one", JPEG), ("a.jpg", JPEG[:-1]), ("a.cls", b"1"), ("b.cls", b"2")]
    links = [
        ("b.jpg", tarfile.LNKTYPE, "a.jpg"),
        ("c.jpg", tarfile.LNKTYPE, "b.jpg"),
        ("c.cls", tarfile.LNKTYPE, "a.cls"),
        ("d.jpg", tarfile.LNKTYPE, "blobs/one"),
        ("e.jpg", tarfile.LNKTYPE, "gone.jpg"),
        ("f.jpg", tarfile.LNKTYPE, "z.jpg"),
    ]
    path = special(tmp_path / "0.tar", *links, members=members)
    if compressed:
        path = tmp_path / "1.tar.gz"
        path.write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    photos, _ = read(path)
    assert [(item.key, item.data, item.label) for item in photos] == [
        ("a", JPEG[:-1], 1),
        ("b", JPEG[:-1], 2),
        ("c", JPEG[:-1], 1),
        ("d", JPEG, None),
        ("e", b"", None),
        ("f", b"", None),
    ]
    assert [item.problem for item in photos[:4]] == [""] * 4
    assert "hard link to 'gone.jpg'" in photos[4].problem


def test_hard_links_are_read_from_afar(tmp_path: Path) -> None:
    path = special(tmp_path / "0.tar", ("b.jpg", tarfile.LNKTYPE, "a.jpg"), members=[("a.jpg", JPEG)])
    fs = fsspec.filesystem("memory")
    try:
        fs.pipe_file("/links/0.tar", path.read_bytes())
        assert [item.data for item in read("memory://links/0.tar")[0]] == [JPEG, JPEG]
    finally:
        fs.rm("/links", recursive=True)


def test_other_links_and_devices_are_counted(tmp_path: Path) -> None:
    others = [
        ("b.jpg", tarfile.SYMTYPE, "a.jpg"),
        ("c.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        ("d.jpg", tarfile.FIFOTYPE, ""),
        ("e.jpg", tarfile.CHRTYPE, ""),
        ("folder", tarfile.DIRTYPE, ""),
    ]
    photos, counts = read(special(tmp_path / "0.tar", *others, members=[("a.jpg", JPEG)]))
    assert keys_and_labels(photos) == {"a": None}
    assert counts == {"symbolic links": 2, "devices, pipes and sockets": 2}


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("names", [["n01.tar", "n02.tar"], ["README.txt", "deep/n01.tar.gz"], ["a.TGZ"]])
def test_a_shard_of_tars_is_refused(tmp_path: Path, names: list[str], on_error: str) -> None:
    path = write_tar(tmp_path / "in/0.tar", [(name, b"tar") for name in names])
    with pytest.raises(LayoutError, match="holds tars, not photos") as caught:
        extract(tiny_config(path, tmp_path / "c", None, views_only=True, on_error=on_error))
    assert "unpack it once" in caught.value.todo


def test_a_tar_among_photos_is_passed_over(tmp_path: Path) -> None:
    photos, counts = read(write_tar(tmp_path / "0.tar", [("code.tar.gz", b"x"), ("p.jpg", JPEG)]))
    assert (keys_and_labels(photos), counts) == ({"p": None}, {".gz files": 1})


def test_a_shard_without_photos_says_what_is_in_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.txt", b"x"), ("b.txt", b"x"), (".c.jpg", JPEG)])
    with pytest.raises(SourceError, match=r"holds no photos; in it: \.txt files \(2\), hidden \(1\)"):
        read(path)


# ---- in a cache ----------------------------------------------------------------------------------------------


def test_what_was_passed_over_is_recorded_and_told(tmp_path: Path) -> None:
    first = [("a.jpg", JPEG), ("a.cls", b"1"), ("README", b"r"), (".x.jpg", JPEG)]
    write_tar(tmp_path / "in/0.tar", first)
    write_tar(tmp_path / "in/1.tar", [("b.jpg", JPEG), ("b.cls", b"2"), ("dataset.json", b"{}")])
    (tmp_path / "in/._1.tar").write_bytes(b"macOS")
    (tmp_path / "in/notes.txt").write_text("beside the shards")
    told = {"hidden": 2, "files without a suffix": 1, ".json files": 1, ".txt files": 1}
    config = tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True)
    made = extract(config)
    assert (made.photos, made.passed_over) == (2, told)
    before = files_below(tmp_path / "c")
    (tmp_path / "in/later.txt").write_text("does not matter")
    assert extract(config).passed_over == info(str(tmp_path / "c"))["passed_over"] == told
    assert files_below(tmp_path / "c") == before
