"""Source shards: how they are found and named, what becomes of their members, and that no damage ends quietly."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tec_cache.data import folders
from tec_cache.data.folders import FolderShard
from tec_cache.data.photos import Photo, Shard
from tec_cache.data.source import open_source
from tec_cache.errors import SourceError
from tests.conftest import encoded, photo, write_shards, write_tar

JPEG = encoded(photo(0))


def names(shards: list[Shard]) -> list[str]:
    return [shard.name for shard in shards]


def read(path: Path) -> list[Photo]:
    (shard,) = open_source(str(path)).shards
    return list(shard.photos())


def read_damaged(path: Path) -> tuple[list[str], SourceError]:
    """Return the keys that come before the error, and the error."""
    (shard,) = open_source(str(path)).shards
    keys: list[str] = []
    with pytest.raises(SourceError) as caught:
        keys.extend(item.key for item in shard.photos())
    assert caught.value.where == str(path)
    assert caught.value.todo
    return keys, caught.value


# ---- finding shards ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("tars"), [2, 1, 3])


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("{}/shard-{{000000..000002}}.tar", [0, 1, 2]),
        ("{}/shard-{{000002,000000}}.tar", [2, 0]),
        ("{}/shard-*.tar", [0, 1, 2]),
        ("{}/shard-00000[12].tar", [1, 2]),
        ("{}", [0, 1, 2]),
        ("{}/shard-000001.tar", [1]),
        ("file://{}/shard-{{000000..000001}}.tar", [0, 1]),
    ],
)
def test_shards_are_found_in_order(tars: Path, pattern: str, found: list[int]) -> None:
    shards = open_source(pattern.format(tars)).shards
    assert names(shards) == [f"shard-{i:06d}.tar" for i in found]
    assert [shard.size for shard in shards] == [(tars / shard.name).stat().st_size for shard in shards]
    assert [len(list(shard.photos())) for shard in shards] == [[2, 1, 3][i] for i in found]


def test_other_files_beside_the_tars_of_a_folder_are_left_alone(tmp_path: Path) -> None:
    write_shards(tmp_path, [1])
    (tmp_path / "README.txt").write_text("not a tar")
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    assert names(open_source(str(tmp_path)).shards) == ["shard-000000.tar"]


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".TAR"])
def test_compressed_tars_are_read(tars: Path, tmp_path: Path, suffix: str) -> None:
    data = (tars / "shard-000002.tar").read_bytes()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data if suffix == ".TAR" else gzip.compress(data))
    assert names(open_source(str(tmp_path)).shards) == [f"a{suffix}"]
    assert read(path) == read(tars / "shard-000002.tar")


@pytest.mark.parametrize("pattern", ["memory://h4/{000..001}.tar", "memory://h4/*.tar"])
def test_shards_behind_a_url(tars: Path, pattern: str) -> None:
    fs = fsspec.filesystem("memory")
    try:
        for i in range(2):
            fs.pipe_file(f"/h4/{i:03d}.tar", (tars / f"shard-{i:06d}.tar").read_bytes())
        shards = open_source(pattern).shards
        assert names(shards) == ["000.tar", "001.tar"]
        assert all(shard.place.startswith("memory://") for shard in shards)
        assert [item.key for shard in shards for item in shard.photos()] == ["p00000", "p00001", "p00002"]
        with pytest.raises(SourceError, match=r"did you mean 001\.tar"):
            open_source("memory://h4/0001.tar")
    finally:
        fs.rm("/h4", recursive=True)


def test_names_and_identity_do_not_depend_on_the_folder(tars: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(tars, moved)
    before, after = open_source(str(tars)).shards, open_source(f"{moved}/shard-{{000000..000002}}.tar").shards
    assert [shard.identity() for shard in before] == [shard.identity() for shard in after]
    assert [list(a.photos()) for a in before] == [list(b.photos()) for b in after]


def test_file_names_that_clash_fall_back_on_relative_paths(tmp_path: Path) -> None:
    def make(root: Path) -> list[str]:
        for folder in ("x/train", "y/train"):
            write_tar(root / "common" / folder / "0.tar", [("a.jpg", JPEG)])
        return names(open_source(f"{root}/common/{{x,y}}/train/0.tar").shards)

    assert make(tmp_path / "here") == ["x/train/0.tar", "y/train/0.tar"]
    assert make(tmp_path / "there" / "below") == ["x/train/0.tar", "y/train/0.tar"]


def test_a_shard_named_twice_is_refused(tars: Path) -> None:
    with pytest.raises(SourceError, match="named twice"):
        open_source(f"{tars}/shard-{{000001,000001}}.tar")


def test_a_missing_shard_names_the_nearest(tars: Path) -> None:
    with pytest.raises(SourceError, match=r"no such file or folder \(did you mean shard-000002\.tar") as caught:
        open_source(f"{tars}/shard-{{000000..000003}}.tar")
    assert caught.value.where == f"{tars}/shard-000003.tar"
    with pytest.raises(SourceError, match="no such file or folder"):
        open_source(f"{tars}/no/such/folder/0.tar")


def test_a_pattern_without_a_match_is_refused(tars: Path) -> None:
    with pytest.raises(SourceError, match="no shard matches") as caught:
        open_source(f"{tars}/train-*.tar")
    assert caught.value.where == f"{tars}/train-*.tar"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(SourceError, match="neither photos nor tars"):
        open_source(str(tmp_path))


# ---- a plain folder of photos --------------------------------------------------------------------------------


def imagenet_like(root: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:04d}.{['jpg', 'JPEG', 'png'][i % 3]}").write_bytes(b"%d" % i)
    return root


def test_a_folder_is_cut_into_shards_of_mixed_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "FOLDER_SHARD", 16)
    # made out of order: the numbers of the classes follow the sorted names, not the disk
    root = imagenet_like(tmp_path / "train", {"n03": 20, "n01": 20, "n02": 20})
    (root / "n01" / "notes.txt").write_text("left alone")
    shards = open_source(str(root)).shards
    assert names(shards) == [f"folder-{i:06d}" for i in range(4)]
    assert [shard.size for shard in shards] == [16, 16, 16, 12]
    photos = [list(shard.photos()) for shard in shards]
    assert all(len({item.label for item in part}) == 3 for part in photos)
    everything = [item for part in photos for item in part]
    assert sorted(item.key for item in everything) == sorted(
        f"{name}/{i:04d}.{['jpg', 'JPEG', 'png'][i % 3]}" for name in ("n01", "n02", "n03") for i in range(20)
    )
    for item in everything:
        folder, _, file = item.key.partition("/")
        assert item.label == {"n01": 0, "n02": 1, "n03": 2}[folder]
        assert item.data == b"%d" % int(file.split(".")[0])
        assert not item.problem


def test_the_order_of_a_folder_follows_the_seed_alone(tmp_path: Path) -> None:
    root = imagenet_like(tmp_path / "a", {"x": 30, "y": 30})
    moved = shutil.copytree(root, tmp_path / "moved")
    keys = [item.key for item in open_source(str(root)).shards[0].photos()]
    assert [item.key for item in open_source(str(moved)).shards[0].photos()] == keys
    assert open_source(str(moved)).shards[0].identity() == open_source(str(root)).shards[0].identity()
    other = open_source(str(root), seed=1).shards[0]
    assert [item.key for item in other.photos()] != keys
    assert sorted(item.key for item in other.photos()) == sorted(keys)
    # pinned: a cache must find the same photos in the same shard forever
    assert keys[:4] == ["x/0013.JPEG", "y/0003.jpg", "x/0011.png", "y/0021.jpg"]


def test_a_renamed_photo_changes_the_identity_of_its_shard(tmp_path: Path) -> None:
    root = imagenet_like(tmp_path / "a", {"x": 5})
    before = open_source(str(root)).shards[0].identity()
    (root / "x" / "0000.jpg").rename(root / "x" / "renamed.jpg")
    assert open_source(str(root)).shards[0].identity() != before


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    (shard,) = open_source(str(tmp_path)).shards
    assert [item.label for item in shard.photos()] == [None] * 3


def test_a_file_that_is_gone_by_now_has_a_problem_and_keeps_its_place(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    (shard,) = open_source(str(tmp_path)).shards
    before = [item.key for item in shard.photos()]
    (tmp_path / "1.png").unlink()
    after = list(shard.photos())
    assert [item.key for item in after] == before
    assert {item.key: item.problem for item in after} == {
        "0.png": "",
        "1.png": "cannot be read: No such file or directory",
        "2.png": "",
    }


def test_names_that_are_not_utf8_can_be_recorded(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(JPEG)
    except OSError:  # a file system that allows UTF-8 names only: then there is no such photo either
        pass
    else:
        (shard,) = open_source(str(tmp_path)).shards
        assert isinstance(shard, FolderShard)
        assert shard.identity()
        (item,) = shard.photos()
        assert (item.key.encode(), item.data) == (rb"\udcff.jpg", JPEG)
    path = write_tar(tmp_path / "t.tar", [("caf\udce9.jpg", JPEG)])
    (item,) = read(path)
    assert item.key.encode() == rb"caf\udce9"


# ---- damaged tars --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, tarfile.TarInfo]]:
    """A tar of six labelled photos, and its members."""
    path = write_shards(tmp_path_factory.mktemp("whole"), [6]) / "shard-000000.tar"
    with tarfile.open(path) as tar:
        return path.read_bytes(), {info.name: info for info in tar}


def before(number: int) -> list[str]:
    return [f"p{i:05d}" for i in range(number)]


Cut = Callable[[dict[str, tarfile.TarInfo]], int]
# Where the tar is cut, and how many of its six photos come before. A photo is given once the next one has begun:
# until then nobody knows whether a label of it is still to come.
CUTS: dict[str, tuple[Cut, int]] = {
    "first payload": (lambda m: m["p00000.jpg"].offset_data + 100, 0),
    "payload": (lambda m: m["p00003.jpg"].offset_data + 100, 2),
    "payload, at a block": (lambda m: m["p00003.jpg"].offset_data + 512, 2),
    "padding of a payload": (lambda m: m["p00003.jpg"].offset_data + m["p00003.jpg"].size + 1, 3),
    "header": (lambda m: m["p00003.jpg"].offset + 200, 2),
    "header of a label": (lambda m: m["p00003.cls"].offset + 511, 3),
    "boundary between photos": (lambda m: m["p00003.jpg"].offset, 2),
    "boundary before a label": (lambda m: m["p00003.cls"].offset, 3),
    "no end marker": (lambda m: m["p00005.cls"].offset_data + 512, 5),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_tar_raises_after_what_comes_before(
    whole: tuple[bytes, dict[str, tarfile.TarInfo]], tmp_path: Path, cut: str
) -> None:
    data, members = whole
    where, count = CUTS[cut]
    path = tmp_path / "cut.tar"
    path.write_bytes(data[: where(members)])
    keys, error = read_damaged(path)
    assert keys == before(count)
    assert "damaged shard" in error.what
    assert "cut" in error.what or "end of data" in error.what


def test_no_cut_anywhere_ends_quietly(whole: tuple[bytes, dict[str, tarfile.TarInfo]], tmp_path: Path) -> None:
    data, members = whole
    end = members["p00005.cls"].offset_data + 512
    path = tmp_path / "cut.tar"
    for length in range(0, end + 1, 97):
        path.write_bytes(data[:length])
        keys, _ = read_damaged(path)
        assert keys == before(len(keys))
    path.write_bytes(data[: end + 1024])  # only padding is missing: whole
    assert [item.key for item in read(path)] == before(6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda header: bytes([header[0] ^ 1]) + header[1:], "corrupt"),
        (lambda header: header[:148] + b"zzzzzzzz" + header[156:], "corrupt"),
        (lambda header: b"\xff" * 512, "corrupt"),
        (lambda header: bytes(512), "end marker comes too early"),
    ],
    ids=["a bit", "checksum field", "overwritten", "zeros"],
)
@pytest.mark.parametrize(("member", "count"), [("p00000.jpg", 0), ("p00003.jpg", 2), ("p00005.cls", 5)])
def test_a_corrupt_header_raises_after_what_comes_before(
    whole: tuple[bytes, dict[str, tarfile.TarInfo]],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    message: str,
    member: str,
    count: int,
) -> None:
    data, members = whole
    at = members[member].offset
    path = tmp_path / "corrupt.tar"
    path.write_bytes(data[:at] + damage(data[at : at + 512]) + data[at + 512 :])
    keys, error = read_damaged(path)
    assert keys == before(count)
    assert message in error.what


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged shard"),
        (bytes(512), "holds no photos"),
        (bytes(10240), "holds no photos"),
        (b"this is a letter, not an archive. " * 100, "damaged shard"),
        (JPEG, "damaged shard"),
        (gzip.compress(b""), "damaged shard"),
        (gzip.compress(bytes(10240)), "holds no photos"),
    ],
    ids=["empty file", "one block", "no members", "text", "a photo", "empty gz", "gz of no members"],
)
def test_a_file_that_is_no_tar_of_photos_raises(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(data)
    keys, error = read_damaged(path)
    assert keys == []
    assert message in error.what


def test_a_tar_of_folders_only_holds_no_photos(tmp_path: Path) -> None:
    path = tmp_path / "folders.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("n01")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    assert "holds no photos" in read_damaged(path)[1].what


def test_a_truncated_gz_raises_after_what_comes_before(
    whole: tuple[bytes, dict[str, tarfile.TarInfo]], tmp_path: Path
) -> None:
    data, _ = whole
    packed = gzip.compress(data, compresslevel=0)  # stored, so that a part of the file is a part of the tar
    path = tmp_path / "cut.tar.gz"
    counts = []
    for length in (1, 8, 15, 3000, len(data) // 3, len(data) // 2):
        path.write_bytes(packed[:length])
        keys, _ = read_damaged(path)
        assert keys == before(len(keys))
        counts.append(len(keys))
    assert counts == sorted(counts)
    assert 0 < counts[-1] < 6
    packed = gzip.compress(data)
    path.write_bytes(packed[: len(packed) // 2])
    assert read_damaged(path)[0] == before(len(read_damaged(path)[0]))
    path.write_bytes(packed[:20] + bytes(200) + packed[220:])
    read_damaged(path)


# ---- keys and fields -----------------------------------------------------------------------------------------


def found(tmp_path: Path, members: list[tuple[str, bytes]]) -> list[tuple[str, int | None, str]]:
    """Return (key, label, problem); check that a photo has data exactly if it has no problem."""
    photos = read(write_tar(tmp_path / "t.tar", members))
    assert all(bool(item.data) == (not item.problem) for item in photos)
    return [(item.key, item.label, item.problem) for item in photos]


def test_keys_with_dots_are_two_photos(tmp_path: Path) -> None:
    members = [("n01.5_x.jpg", JPEG), ("n01.5_x.cls", b"3"), ("n01.6_y.jpg", JPEG), ("n01.6_y.cls", b"4")]
    assert found(tmp_path, members) == [("n01.5_x", 3, ""), ("n01.6_y", 4, "")]


def test_side_data_with_an_image_suffix_belongs_to_its_photo(tmp_path: Path) -> None:
    members = [("000.jpg", JPEG), ("000.seg.png", b"mask"), ("000.cls", b"7"), ("000.json", b"{}")]
    photos = read(write_tar(tmp_path / "t.tar", members))
    assert photos == [Photo("000", JPEG, 7)]
    # whichever comes first
    assert found(tmp_path, [members[1], members[2], members[0]]) == [("000", 7, "")]


def test_keys_keep_their_folders_and_suffixes_may_be_upper_case(tmp_path: Path) -> None:
    members = [
        ("val/n01.old/a.JPG", JPEG),
        ("val/n01.old/a.CLS", b"1\n"),
        ("val/n02/a.Png", JPEG),
        ("./b.jpeg", JPEG),
        ("./b.cls", b" -1 "),
        ("ä ö.webp", JPEG),
    ]
    assert found(tmp_path, members) == [
        ("val/n01.old/a", 1, ""),
        ("val/n02/a", None, ""),
        ("./b", -1, ""),
        ("ä ö", None, ""),
    ]


def test_a_label_may_come_before_its_photo(tmp_path: Path) -> None:
    assert found(tmp_path, [("a.cls", b"5"), ("a.jpg", JPEG), ("b.jpg", JPEG)]) == [("a", 5, ""), ("b", None, "")]


TWICE = "its key appears twice in the shard"


@pytest.mark.parametrize("apart", [False, True])
def test_duplicate_keys_have_a_problem(tmp_path: Path, apart: bool) -> None:
    first = [("a.jpg", JPEG), ("a.cls", b"1")]
    between = [("b.jpg", JPEG)] if apart else []
    expected = [("a", 1, ""), *([("b", None, "")] if apart else []), ("a", 2, TWICE)]
    assert found(tmp_path, [*first, *between, ("a.jpg", JPEG), ("a.cls", b"2")]) == expected


@pytest.mark.parametrize("apart", [False, True])
def test_duplicate_keys_with_dots_have_a_problem(tmp_path: Path, apart: bool) -> None:
    between = [("a.2.jpg", JPEG)] if apart else []
    key = "a.1" if apart else "a"  # alone, it is WebDataset's key and a field 1.jpg
    photos = found(tmp_path, [("a.1.jpg", JPEG), *between, ("a.1.jpg", JPEG)])
    assert [(k, problem) for k, _, problem in photos if k == key] == [(key, ""), (key, TWICE)]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.cls", b"1"), ("a.json", b"{}")], ("a", 1, "no image among its fields (cls, json)")),
        ([("a.jpg", JPEG), ("a.png", JPEG)], ("a", None, "more than one image (jpg, png)")),
    ],
)
def test_broken_samples_keep_their_place_and_say_what_is_wrong(
    tmp_path: Path, members: list[tuple[str, bytes]], expected: tuple[str, int | None, str]
) -> None:
    assert found(tmp_path, [("0.jpg", JPEG), *members, ("z.jpg", JPEG)]) == [
        ("0", None, ""),
        expected,
        ("z", None, ""),
    ]


def test_long_names_are_whole(tmp_path: Path) -> None:
    key = "deep/" * 40 + "ü" * 120
    for layout in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / "t.tar"
        with tarfile.open(path, "w", format=layout) as tar:
            info = tarfile.TarInfo(key + ".jpg")
            tar.addfile(info)
        assert [item.key for item in read(path)] == [key]
