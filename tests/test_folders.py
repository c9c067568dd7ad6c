"""Folders of photos: what is a photo and what is a class, whatever else lies there; and that all else is counted."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.extract import extract
from pipelines.info import info
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.data.photos import Photo
from tec_cache.data.source import Source, open_source
from tec_cache.errors import ConfigError, IdentityError, LayoutError, SourceError
from tests.conftest import encoded, photo, tiny_config

JPEG = encoded(photo(0))


def make(root: Path, *files: str, data: bytes = b"x") -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(data)
    return root


def photos(source: Source) -> dict[str, Photo]:
    return {item.key: item for shard in source.shards for item in shard.photos()}


def labels(root: Path) -> dict[str, str | None]:
    """Key -> the name of its class."""
    source = open_source(str(root))
    names = source.classes or ()
    return {key: None if item.label is None else names[item.label] for key, item in photos(source).items()}


CLEAN = ("cat/0.jpg", "cat/1.JPEG", "dog/0.png", "owl/0.webp")
CLUTTER = {
    "notebook": ([".ipynb_checkpoints/0-checkpoint.jpg"], {"hidden": 1}),
    "macOS": (["__MACOSX/cat/._0.jpg", "cat/._0.jpg", "dog/.DS_Store", ".DS_Store"], {"hidden": 4}),
    "hidden in a class": (["cat/.thumbnails/0.jpg", "cat/.thumbnails/1.jpg"], {"hidden": 1}),
    "version control": ([".git/objects/a.png", ".gitignore"], {"hidden": 2}),
    "notes": (["README.md", "cat/notes.txt", "dog/notes.TXT"], {".md files": 1, ".txt files": 2}),
    "Windows": (["cat/Thumbs.db", "desktop.ini"], {".db files": 1, ".ini files": 1}),
    "no suffix": (["LICENSE", "cat/jpg"], {"files without a suffix": 2}),
    "unknown photos": (["cat/9.heic", "cat/8.CR2"], {".heic files": 1, ".cr2 files": 1}),
    "folder without photos": (["docs/manual.pdf"], {".pdf files": 1, "folders without photos": 1}),
    "odd suffixes": (["cat/a.x y z", "cat/b.überlang123"], {"other files": 2}),
}


@pytest.mark.parametrize("name", CLUTTER)
def test_clutter_is_no_photo_and_no_class_and_is_counted(tmp_path: Path, name: str) -> None:
    clean, clutter = make(tmp_path / "clean", *CLEAN), make(tmp_path / "train", *CLEAN, *CLUTTER[name][0])
    assert labels(clutter) == labels(clean)
    assert open_source(str(clutter)).classes == ("cat", "dog", "owl")
    assert open_source(str(clean)).passed_over == {}
    assert open_source(str(clutter)).passed_over == CLUTTER[name][1]


def test_an_empty_folder_is_no_class(tmp_path: Path) -> None:
    root = make(tmp_path / "a", *CLEAN)
    (root / "bird").mkdir()
    source = open_source(str(root))
    assert (source.classes, source.passed_over) == (("cat", "dog", "owl"), {"folders without photos": 1})


@pytest.mark.parametrize("suffix", ["jfif", "JFIF", "avif", "jpe", "Jpg", "TIFF", "pgm"])
def test_suffixes_of_photos(tmp_path: Path, suffix: str) -> None:
    assert list(labels(make(tmp_path / "a", f"c/x.{suffix}"))) == [f"c/x.{suffix}"]


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    full = make(tmp_path / "full", *(f"{c}/{c}{i}.jpg" for c in "abcde" for i in range(4)))
    subset = make(tmp_path / "subset", "e/e9.jpg")
    for name in "ac":
        (subset / name).symlink_to(full / name)
    expected = {f"{c}/{c}{i}.jpg": c for c in "ac" for i in range(4)}
    assert labels(subset) == expected | {"e/e9.jpg": "e"}
    # a set of nothing but links, one of them relative, one of the photos in it a link itself
    links = tmp_path / "links"
    links.mkdir()
    (links / "a").symlink_to(Path("../full/a"))
    (links / "c").mkdir()
    for i in range(4):
        (links / "c" / f"c{i}.jpg").symlink_to(full / "c" / f"c{i}.jpg")
    assert labels(links) == expected


@pytest.mark.parametrize("back", [".", "..", "../..", "../../class", "../sub"])
def test_cycles_of_links_end_and_are_counted(tmp_path: Path, back: str) -> None:
    root = make(tmp_path / "a", "class/0.jpg", "class/sub/1.jpg")
    (root / "class/sub/back").symlink_to(back, target_is_directory=True)
    source = open_source(str(root))
    assert set(photos(source)) == {"class/0.jpg", "class/sub/1.jpg"}
    assert source.passed_over == {"links to a folder that they are in": 1}


def test_two_folders_that_link_to_each_other(tmp_path: Path) -> None:
    root = make(tmp_path / "root", "a/0.jpg", "b/0.jpg")
    (root / "a/b").symlink_to(root / "b")
    (root / "b/a").symlink_to(root / "a")
    source = open_source(str(root))
    assert set(photos(source)) == {"a/0.jpg", "b/0.jpg", "a/b/0.jpg", "b/a/0.jpg"}
    assert source.passed_over == {"links to a folder that they are in": 2}


def test_a_link_that_leads_nowhere_is_a_photo_that_cannot_be_read(tmp_path: Path) -> None:
    root = make(tmp_path / "a", "c/0.jpg")
    (root / "c/1.jpg").symlink_to(tmp_path / "gone.jpg")
    (root / "c/2.jpg").symlink_to("2.jpg")
    found = photos(open_source(str(root)))
    assert [found[f"c/{i}.jpg"].problem[:15] for i in range(3)] == ["", "cannot be read:", "cannot be read:"]


def test_pipes_are_never_opened(tmp_path: Path) -> None:
    root = make(tmp_path / "a", "c/0.jpg")
    os.mkfifo(root / "c/1.jpg")
    source = open_source(str(root))
    assert set(photos(source)) == {"c/0.jpg"}
    assert source.passed_over == {"devices, pipes and sockets": 1}


SPLITS = {
    "train and val": (["train/a/0.jpg", "val/a/0.jpg"], ["train", "val"]),
    "upper case, with other folders": (["Train/a/0.JPEG", "TEST/a/0.JPEG", "docs/figure.png"], ["TEST", "Train"]),
    "train alone": (["train/a/0.jpg", "train/b/0.jpg"], ["train"]),
    "flat test": (["train/a/0.jpg", "val/a/0.jpg", "test/0.jpg"], ["train", "val"]),
    "COCO": (["train2017/0.jpg", "val2017/1.jpg"], ["train2017", "val2017"]),
    "two levels up": (["small/train/a/0.jpg", "small/val/a/1.jpg"], ["small/train", "small/val"]),
    "ImageNet": (["Data/CLS-LOC/train/n01/0.JPEG", "Data/CLS-LOC/test/1.JPEG"], ["Data/CLS-LOC/train"]),
    "images of sets": (["training_set/cats/0.jpg", "test_set/cats/0.jpg"], ["test_set", "training_set"]),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_folder_above_the_parts_of_a_data_set_is_refused(tmp_path: Path, name: str) -> None:
    files, places = SPLITS[name]
    root = make(tmp_path / "root", *files)
    with pytest.raises(LayoutError, match="parts of a data set") as caught:
        open_source(str(root))
    assert all(f"{root}/{place}" in caught.value.todo for place in places)
    assert len(labels(root / places[0])) >= 1, "the remedy works"


@pytest.mark.parametrize("files", [["train/0.jpg", "car/0.jpg"], ["test/0.jpg"], ["cat/train/0.jpg", "dog/test/0.jpg"]])
def test_classes_may_be_called_train(tmp_path: Path, files: list[str]) -> None:
    root = make(tmp_path / "root", *files)
    assert labels(root) == {file: file.split("/")[0] for file in files}


def test_photos_that_lie_deeper_have_the_class_of_their_first_folder_and_that_is_said(tmp_path: Path) -> None:
    root = make(tmp_path / "a", "cat/black/0.jpg", "cat/1.jpg", "dog/old/brown/0.jpg")
    source = open_source(str(root))
    assert labels(root) == {"cat/black/0.jpg": "cat", "cat/1.jpg": "cat", "dog/old/brown/0.jpg": "dog"}
    assert "2 of 3 photos lie deeper" in source.remarks[0]
    above = open_source(str(make(tmp_path / "b", "images/cat/0.jpg", "images/dog/0.jpg")))
    assert above.classes == ("images",)
    assert "all of them are in images" in above.remarks[1]
    assert not open_source(str(make(tmp_path / "c", *CLEAN))).remarks


def test_photos_beside_the_class_folders_have_no_label_and_a_note(tmp_path: Path) -> None:
    found = photos(open_source(str(make(tmp_path / "a", "cat/0.jpg", "dog/0.jpg", "stray.jpg"))))
    assert {key: item.label for key, item in found.items()} == {"cat/0.jpg": 0, "dog/0.jpg": 1, "stray.jpg": None}
    assert "beside the class folders" in found["stray.jpg"].note
    flat = open_source(str(make(tmp_path / "flat", "0.jpg", "1.jpg")))
    assert flat.classes is None
    assert all((item.label, item.note) == (None, "") for item in photos(flat).values())


def test_a_folder_without_photos_says_what_is_in_it(tmp_path: Path) -> None:
    root = make(tmp_path / "a", "x/0.tar", "x/1.tar", "y/notes.txt", ".hidden.jpg")
    with pytest.raises(SourceError, match="neither photos nor tars") as caught:
        open_source(str(root))
    assert caught.value.what.endswith("in it: .tar files (2), .txt files (1), hidden (1)")
    assert f"'{root}/x/*.tar'" in caught.value.todo


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(0, 10**6))
def test_no_clutter_and_no_order_of_making_changes_photos_or_labels(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    rng = random.Random(seed)
    files = sorted({f"{rng.choice('abc')}/{rng.randrange(9)}.{rng.choice(['jpg', 'PNG'])}" for _ in range(8)})
    clutter = rng.sample([file for extra, _ in CLUTTER.values() for file in extra], rng.randrange(5))
    folder = tmp_path_factory.mktemp("any")
    clean = make(folder / "clean", *files)
    dirty = make(folder / "dirty", *rng.sample([*files, *clutter], len(files) + len(clutter)))
    if rng.random() < 0.5:  # one of the classes lies elsewhere
        name = files[0].split("/")[0]
        (dirty / name).rename(folder / "elsewhere")
        (dirty / name).symlink_to(folder / "elsewhere")
    before, after = open_source(str(clean), seed=seed), open_source(str(dirty), seed=seed)
    assert after.classes == before.classes
    assert [list(shard.photos()) for shard in after.shards] == [list(shard.photos()) for shard in before.shards]
    assert [shard.identity() for shard in after.shards] == [shard.identity() for shard in before.shards]


# ---- in a cache ----------------------------------------------------------------------------------------------


def test_what_was_read_and_passed_over_is_told_by_extract_and_info(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "stray.jpg", data=JPEG)
    make(root, ".DS_Store", "notes.txt", "dog/.git/x.jpg")
    config = tiny_config(root, tmp_path / "c", None, views_only=True)
    told = {"hidden": 2, ".txt files": 1}
    planned = extract(config, dry_run=True)
    assert (planned.labels.names, planned.passed_over) == (["cat", "dog"], told)
    made = extract(config)
    assert (made.photos, made.passed_over) == (4, told)
    labels = made.labels
    assert (labels.photos, labels.labelled, labels.classes, labels.names) == (4, 3, 2, ["cat", "dog"])
    (root / "later.txt").write_text("does not matter")
    again = extract(tiny_config(root, tmp_path / "c", None, views_only=True, views=3))
    assert (again.views_made, again.passed_over) == (4, told)
    found = info(str(tmp_path / "c"))
    assert (found["labels"], found["passed_over"]) == (made.labels.to_json(), told)
    assert open_cache(tmp_path / "c").identity["classes"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda root: make(root, "bird/0.jpg", data=JPEG), "only asked are 1: bird"),
        (lambda root: (root / "cat/0.jpg").unlink(), "only stored are 1: cat"),
        (lambda root: (root / "dog").rename(root / "wolf"), "only stored are 1: dog"),
    ],
)
def test_a_class_that_comes_or_goes_between_two_runs_is_refused(tmp_path: Path, change: object, told: str) -> None:
    root = make(tmp_path / "in", "cat/0.jpg", "dog/0.jpg", "owl/0.jpg", data=JPEG)
    extract(tiny_config(root, tmp_path / "c", None, views_only=True, views=1))
    before = open_cache(tmp_path / "c").views_record(Unit(0, 0, 0)).labels
    change(root)  # type: ignore[operator]
    with pytest.raises(IdentityError, match="classes: " + told):
        extract(tiny_config(root, tmp_path / "c", None, views_only=True, views=2))
    assert open_cache(tmp_path / "c").views_record(Unit(0, 0, 0)).labels == before
    assert extract(tiny_config(root, tmp_path / "c", None, views_only=True), overwrite=True).missing == 0


def test_a_class_list_numbers_the_folders_and_is_kept(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "cat/0.jpg", "dog/0.jpg", "emu/0.jpg", data=JPEG)
    (tmp_path / "names.txt").write_text("dog\ncat\nowl\n")
    config = tiny_config(root, tmp_path / "c", None, views_only=True, views=1, classes=str(tmp_path / "names.txt"))
    extract(config)
    record = open_cache(tmp_path / "c").views_record(Unit(0, 0, 0))
    expected = {"cat/0.jpg": 1, "dog/0.jpg": 0, "emu/0.jpg": None}
    assert dict(zip(record.keys, record.labels, strict=True)) == expected
    # going on needs no list: it is the cache's
    extract(tiny_config(root, tmp_path / "c", None, views_only=True, views=2))
    record = open_cache(tmp_path / "c").views_record(Unit(0, 0, 1))
    assert dict(zip(record.keys, record.labels, strict=True)) == expected
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(IdentityError, match="classes: only stored are 1: owl"):
        extract(config)


def test_the_field_of_labels_is_no_setting_of_folders(tmp_path: Path) -> None:
    root = make(tmp_path / "in", "cat/0.jpg", data=JPEG)
    with pytest.raises(ConfigError, match="--label-field x with a folder"):
        extract(tiny_config(root, tmp_path / "c", None, views_only=True, label_field="x"))


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_run_that_used_no_photo_fails(tmp_path: Path, on_error: str) -> None:
    root = make(tmp_path / "in", "cat/0.jpg", "cat/1.jpg", data=b"no photo")
    config = tiny_config(root, tmp_path / "c", None, views_only=True, on_error=on_error)
    message = "no photo could be used: .*0.jpg" if on_error == "skip" else "photo 'cat"
    for _ in range(2):  # also when nothing is left to be done
        with pytest.raises(SourceError, match=message):
            extract(config)
