"""A probe takes photos and caches in any mix, by folder or URL, and means the same by a class in both parts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipelines.extract import extract
from pipelines.judging.frozen_features import kind_of
from pipelines.judging.probe_inputs import Numbering, Part, is_cache, number_classes, open_part
from pipelines.pack import pack
from pipelines.probe import ProbeSummary, probe
from pipelines.terminal.texts import probe_text
from tec_cache.config import ProbeConfig
from tec_cache.data.photos import Photo
from tec_cache.errors import ConfigError, SourceError
from tests.conftest import encoded, files_below, tiny_config, write_tar

NUMBERS = itertools.count()
COLOURS = {"cat": (220, 30, 30), "dog": (30, 220, 30), "owl": (30, 30, 220)}


def picture(name: str, seed: int) -> Image.Image:
    """A noisy square of the class's colour."""
    noise = np.random.default_rng(seed).normal(0, 20, (40, 40, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8))


def folder_of(root: Path, classes: list[str], count: int) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{name}{number}.jpg").write_bytes(encoded(picture(name, number)))
    return root


def tar_of(path: Path, labels: dict[str, str | None], count: int) -> Path:
    """A tar of photos; labels: class -> what its .cls says."""
    members = []
    for name, number in itertools.product(labels, range(count)):
        members.append((f"{name}{number}.jpg", encoded(picture(name, number))))
        if labels[name] is not None:
            members.append((f"{name}{number}.cls", str(labels[name]).encode()))
    return write_tar(path, members)


def cache_of(source: Path, cache: Path) -> Path:
    extract(tiny_config(source, cache, None, views_only=True, views=1, crop="center", group_size=8))
    return cache


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, str]:
    """The same photos in every form: name -> what the command is given."""
    root = tmp_path_factory.mktemp("probe")
    folder = folder_of(root / "folder", [*COLOURS], 8)
    tars = tar_of(root / "tars.tar", {"cat": "0", "dog": "1", "owl": "2"}, 8)
    cache = cache_of(folder, root / "cache")
    pack(str(cache), str(root / "pack"))
    remote = f"memory://probe-{next(NUMBERS)}/cache"
    fs = fsspec.filesystem("memory")
    for name, data in files_below(cache).items():
        fs.pipe_file(f"{remote}/{name}", data)
    return {
        "folder": str(folder),
        "tars": str(tars),
        "cache": str(cache),
        "pack": str(root / "pack"),
        "URL": remote,
        "cache of tars": str(cache_of(tars, root / "cache-of-tars")),
        "model": str(tiny_base),
    }


def judged(model: str, train: str | Path, test: str | Path, **changes: object) -> ProbeSummary:
    values = {"neighbours": 3, "device": "cpu", "workers": 1, "batch_size": 8, "l2": 1e-2} | changes
    return probe(ProbeConfig(model=model, train=str(train), test=str(test), **values))  # type: ignore[arg-type]


KINDS = ["folder", "tars", "cache", "pack", "URL", "cache of tars"]


@pytest.mark.parametrize("train", KINDS)
@pytest.mark.parametrize("test", KINDS)
def test_any_two_inputs_of_the_same_photos_agree(inputs: dict[str, str], train: str, test: str) -> None:
    summary = judged(inputs["model"], inputs[train], inputs[test])
    assert (summary.train_images, summary.test_images, summary.classes, summary.skipped) == (24, 24, 3, 0)
    assert summary.knn == 1.0  # the colours tell all


def test_what_is_a_cache_is_told_by_what_lies_there(inputs: dict[str, str], tmp_path: Path) -> None:
    assert [name for name in KINDS if is_cache(inputs[name])] == ["cache", "pack", "URL", "cache of tars"]
    assert not is_cache("memory://nowhere/at-all")
    assert not is_cache("memory://nowhere/{000..003}.tar")
    part = open_part(inputs["cache"])
    assert part.cache is not None
    assert not {"views", "records"} & set(part.classes or ())


@pytest.mark.parametrize("form", ["folder", "cache"])
def test_classes_are_matched_by_name_where_the_test_lacks_one(
    inputs: dict[str, str], tmp_path: Path, form: str
) -> None:
    """Owl is class 1 of the test folder, and class 2 of the training folder."""
    test = folder_of(tmp_path / "test", ["cat", "owl"], 6)
    train = open_part(inputs["folder"])
    part = open_part(str(test))
    if form == "cache":  # as one says that was made of class folders
        train = replace(open_part(inputs["cache"]), classes=("cat", "dog", "owl"))
        part = replace(open_part(str(cache_of(test, tmp_path / "c"))), classes=("cat", "owl"))
    _, numbering, remark = number_classes(train, part)
    found = {photo.key.split("/")[0]: numbering.of(photo, place) for photo, place in part.images()}
    assert (found, remark) == ({"cat": 0, "owl": 2}, "")


def test_a_test_that_lacks_a_class_is_judged_rightly(inputs: dict[str, str], tmp_path: Path) -> None:
    summary = judged(inputs["model"], inputs["folder"], folder_of(tmp_path / "test", ["cat", "owl"], 6))
    assert (summary.knn, summary.classes, summary.class_names) == (1.0, 3, ["cat", "dog", "owl"])
    assert "classes      3: cat, dog, owl" in probe_text(summary, 3)


@pytest.mark.parametrize("more", [["fox"], ["fox", "ant"]])
def test_classes_that_were_never_learned_are_named(more: list[str]) -> None:
    train = Part("A", ("cat", "dog", "owl"))
    with pytest.raises(ConfigError) as caught:
        number_classes(train, Part("B", ("cat", *more)))
    assert all(name in caught.value.what for name in (*more, "dog", "owl"))
    assert "cat" not in caught.value.what
    assert (caught.value.where, caught.value.exit_code) == ("A and B", 2)


@pytest.mark.parametrize("named", ["train", "test"])
def test_numbers_against_names_are_taken_for_them_and_it_is_said(inputs: dict[str, str], named: str) -> None:
    other = "test" if named == "train" else "train"
    both = {named: inputs["folder"], other: inputs["tars"]}
    summary = judged(inputs["model"], both["train"], both["test"])
    assert inputs["tars"] in summary.remark
    assert inputs["folder"] in summary.remark
    assert summary.remark in probe_text(summary, 3)
    assert summary.class_names == ["cat", "dog", "owl"]


@pytest.mark.parametrize("named", ["train", "test"])
@pytest.mark.parametrize("label", ["3", "-1", "1000"])
def test_a_number_that_no_name_has_is_refused(inputs: dict[str, str], tmp_path: Path, named: str, label: str) -> None:
    tars = tar_of(tmp_path / "t.tar", {"cat": "0", "dog": "1", "owl": label}, 3)
    both = (inputs["folder"], tars) if named == "train" else (tars, inputs["folder"])
    with pytest.raises(ConfigError, match=f"'owl0' is of class {label}"):
        judged(inputs["model"], *both)


def test_names_are_the_same_whatever_number_a_class_has() -> None:
    _, numbering, _ = number_classes(Part("A", ("owl", "cat")), Part("B", ("cat", "owl")))
    assert numbering == Numbering((1, 0))
    assert [numbering.of(Photo("k", b"", n), "") for n in (0, 1)] == [1, 0]


# ---- what is left out --------------------------------------------------------------------------------------------


def test_a_photo_without_a_label_says_what_there_is_and_what_is_looked_for(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    members = [("a/x.jpg", encoded(picture("cat", 0))), ("a/x.caption", b"a cat"), ("a/x.seg.png", b"")]
    tar = write_tar(tmp_path / "t.tar", members)
    with pytest.raises(ConfigError) as caught:
        judged(inputs["model"], inputs["tars"], tar)
    assert "photo 'a/x': no label" in caught.value.what
    assert "jpg, caption, seg.png" in caught.value.what
    assert "looked for KEY.cls and label, cls, class, class_id" in caught.value.what


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_path_with_nothing_at_it_is_called_so(inputs: dict[str, str], tmp_path: Path, prefix: str) -> None:
    (tmp_path / "cache").mkdir()
    place = f"{prefix}{tmp_path}/cahce"
    with pytest.raises(SourceError, match=r"nothing lies here \(did you mean cache\?\)") as caught:
        judged(inputs["model"], place, inputs["tars"])
    assert caught.value.where == place
    assert all(word in caught.value.todo for word in ("cache.json", "pack.json", "folder of photos", "tars"))
    with pytest.raises(SourceError, match="no such file or folder"):
        judged(inputs["model"], f"{place}.tar", inputs["tars"])


def test_photos_left_out_are_told_by_kind(inputs: dict[str, str], tmp_path: Path) -> None:
    cat = encoded(picture("cat", 0))
    members = [("a.jpg", cat), ("a.cls", b"0"), ("b.jpg", cat[: len(cat) // 2]), ("b.cls", b"0"), ("c.jpg", cat)]
    members += [("d.jpg", b"no photo"), ("d.cls", b"1"), ("e.jpg", cat[:300] + b"x"), ("e.cls", b"1")]
    tar = write_tar(tmp_path / "t.tar", members)
    summary = judged(inputs["model"], inputs["tars"], tar, on_error="skip")
    assert summary.test_images == 1
    assert summary.left_out == {"not a whole image": 2, "no label": 1, "not an image of a known format": 1}
    assert summary.skipped == 4
    text = probe_text(summary, 3)
    assert "left out     4:" in text
    assert "  2 not a whole image" in text
    with pytest.raises(SourceError, match="photo 'b'"):
        judged(inputs["model"], inputs["tars"], write_tar(tmp_path / "s.tar", members[:4]))


def test_what_a_cache_left_out_is_told_too(inputs: dict[str, str], tmp_path: Path) -> None:
    cat = encoded(picture("cat", 0))
    tar = write_tar(tmp_path / "t.tar", [("a.jpg", cat), ("a.cls", b"0"), ("b.jpg", cat[:400]), ("b.cls", b"0")])
    extract(tiny_config(tar, tmp_path / "c", None, views_only=True, views=1, on_error="skip"))
    summary = judged(inputs["model"], inputs["tars"], tmp_path / "c")
    assert (summary.test_images, summary.left_out) == (1, {"not a whole image": 1})


def test_metadata_that_could_not_be_read_are_told(inputs: dict[str, str], tmp_path: Path) -> None:
    cat = encoded(picture("cat", 0))
    bad = cat[:2] + b"\xff\xe1\x00\x0eExif\0\0II*\0\xff\xff" + cat[2:]
    tar = write_tar(tmp_path / "t.tar", [("a.jpg", bad), ("a.cls", b"0")])
    summary = judged(inputs["model"], inputs["tars"], tar)
    assert (summary.test_images, summary.skipped, sum(summary.noted.values())) == (1, 0, 1)
    assert "1 of which something was not understood" in probe_text(summary, 3)


def test_no_usable_photo_says_why(inputs: dict[str, str], tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "t.tar", {"cat": None}, 3)
    with pytest.raises(SourceError, match="no usable images; 3 left out: no label"):
        judged(inputs["model"], inputs["tars"], tar, on_error="skip")


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        ("not a whole image: Corrupt JPEG data: 3 extraneous bytes", "not a whole image"),
        ("no image among its fields (cls, json)", "no image among its fields"),
        ("no label; its sample has jpg", "no label"),
        ("its key appears twice in the shard", "its key appears twice in the shard"),
    ],
)
def test_kinds_have_no_details(problem: str, kind: str) -> None:
    assert kind_of(problem) == kind
