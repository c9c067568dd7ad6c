"""Labels in tars: numbers or names, in .cls, .txt or .json; and that none is ever a reason to refuse a photo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.extract import extract
from pipelines.extraction.label_counts import LabelCounter, classes_text
from pipelines.info import info
from pipelines.terminal.texts import extract_text, info_text
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.config import ExtractConfig
from tec_cache.data import classes as class_lists
from tec_cache.data.classes import read_classes
from tec_cache.data.labels import Labels
from tec_cache.data.source import Source, open_source
from tec_cache.errors import ConfigError, IdentityError, LayoutError
from tests.conftest import encoded, photo, tiny_config, write_tar

JPEG = encoded(photo(0))
Fields = dict[str, bytes]


def tar(path: Path, samples: list[Fields]) -> Path:
    """Write a shard of photos 00, 01, ... with further fields."""
    members = [(f"{i:02d}.{f}", d) for i, fields in enumerate(samples) for f, d in {"jpg": JPEG, **fields}.items()]
    return write_tar(path, members)


def read(source: Source) -> list[tuple[int | None, str]]:
    """Return (label, note) of every photo; none may have a problem."""
    items = [item for shard in source.shards for item in shard.photos()]
    assert all(item.data == JPEG and not item.problem for item in items)
    return [(item.label, item.note) for item in items]


def as_json(**values: Any) -> Fields:
    return {"json": json.dumps(values).encode()}


# ---- one label -----------------------------------------------------------------------------------------------

NUMBERS: list[tuple[Fields, int]] = [
    ({"cls": b"7"}, 7),
    ({"cls": b" -1 \r\n"}, -1),
    ({"cls": b"+07"}, 7),
    ({"cls": b"\xef\xbb\xbf7"}, 7),
    ({"output.cls": b"7"}, 7),
    ({"cls": b"7", "output.cls": b"8"}, 7),
    (as_json(label=7), 7),
    (as_json(label=7.0), 7),
    ({"cls": b"-" + b"9" * 18}, 1 - 10**18),
    (as_json(label=10**18 - 1), 10**18 - 1),
    (as_json(label="7"), 7),
    (as_json(cls=7), 7),
    (as_json(class_id=7, width=96), 7),
    (as_json(target=7, **{"class": 3}), 3),
    (as_json(label=None, target=7), 7),
    ({"meta.json": b'{"label": 7}'}, 7),
    ({"cls": b"7", **as_json(label=8)}, 7),
    ({"cls": b"7", "txt": b"a photo of 7"}, 7),
    ({"cls": b"7", "json": b"not JSON"}, 7),
]


@pytest.mark.parametrize(("fields", "number"), NUMBERS)
def test_labels_that_are_numbers(tmp_path: Path, fields: Fields, number: int) -> None:
    assert read(open_source(str(tar(tmp_path / "0.tar", [fields])))) == [(number, "")]


NO_LABEL: list[Fields] = [
    {},
    as_json(width=96, caption="a dog"),
    as_json(label=None),
    {"json": b"[1, 2]"},
    {"txt": b"a dog on a lawn"},
    {"txt": b"7", **as_json(caption="7")},
    {"depth.npy": b"\x93NUMPY"},
]


@pytest.mark.parametrize("fields", NO_LABEL)
def test_fields_that_are_no_labels_are_none_and_need_no_note(tmp_path: Path, fields: Fields) -> None:
    assert read(open_source(str(tar(tmp_path / "0.tar", [fields])))) == [(None, "")]


UNREADABLE: list[tuple[Fields, str]] = [
    ({"cls": b""}, "is empty"),
    ({"cls": b"\xff\xfe"}, "is not text"),
    ({"cls": b"1.5"}, "neither a whole number nor a name"),
    ({"cls": b"nan"}, "neither a whole number nor a name"),
    ({"cls": b"9" * 30}, "neither a whole number nor a name"),
    ({"cls": b"3\n4"}, "neither a whole number nor a name"),
    ({"cls": b"x" * 500}, "neither a whole number nor a name"),
    ({"cls": b"dog"}, "is a name, where labels are numbers"),
    ({"a.cls": b"1", "b.cls": b"2"}, "--label-field"),
    ({"cls": str(10**30).encode()}, "neither a whole number nor a name"),
    ({"cls": str(-(2**63) - 1).encode()}, "neither a whole number nor a name"),
    (as_json(label=10**30), "neither a whole number nor a name"),
    (as_json(label=str(-(10**30))), "neither a whole number nor a name"),
    (as_json(label=1e30), "neither a whole number nor a name"),
    ({"json": b'{"label": 1%s}' % (b"0" * 400)}, "neither a whole number nor a name"),
    ({"json": b'{"label": 1%s}' % (b"0" * 5000)}, "cannot be read"),
    (as_json(label=[1, 2]), "neither a whole number nor a name"),
    (as_json(label=True), "neither a whole number nor a name"),
    (as_json(label={"id": 3}), "neither a whole number nor a name"),
    (as_json(label=float("nan")), "neither a whole number nor a name"),
    (as_json(label="\ud800"), "neither a whole number nor a name"),
    ({"json": b'{"label": 3'}, "cannot be read"),
    ({"json": b"\xff"}, "cannot be read"),
    ({"json": b'{"a":' * 100_000}, "cannot be read"),
]


@pytest.mark.parametrize(("fields", "note"), UNREADABLE)
def test_a_label_that_cannot_be_read_leaves_the_photo_and_a_note(tmp_path: Path, fields: Fields, note: str) -> None:
    shard = tar(tmp_path / "0.tar", [{"cls": b"5"}, fields, {"cls": b"6"}])
    first, (label, told), last = read(open_source(str(shard)))
    assert (first, label, last) == ((5, ""), None, (6, ""))
    assert note in told
    assert len(told) < 150
    # whatever is in it, extraction goes through as it does without the label
    assert extract(tiny_config(shard, tmp_path / "c", None, views_only=True)).photos == 3
    assert open_cache(tmp_path / "c").views_record(Unit(0, 0, 0)).labels == [5, None, 6]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.dictionaries(st.sampled_from(["cls", "txt", "json", "a.cls", "b.json", "x"]), st.binary(max_size=40)))
def test_no_bytes_break_the_reading_of_labels(fields: Fields) -> None:
    for labels in (Labels(), Labels("txt"), Labels("x"), Labels(classes=("a", "b"))):
        number, note = labels.number(labels.read(fields))
        assert number is None or not note
        assert note.isprintable()


# ---- where labels are, and names of classes ------------------------------------------------------------------

NAMES = ("n02", "n01", "n03", "n01")


def by_name(source: Source) -> list[str | None]:
    assert source.classes is not None
    return [None if label is None else source.classes[label] for label, _ in read(source)]


@pytest.mark.parametrize(
    "fields_of",
    [
        lambda name: {"cls": name.encode()},
        lambda name: {"output.cls": f" {name}\n".encode()},
        lambda name: as_json(label=name),
        lambda name: {"txt": b"a photo", **as_json(label=name)},
    ],
)
def test_names_are_collected_from_all_shards_and_sorted(tmp_path: Path, fields_of: Any) -> None:
    tar(tmp_path / "in/0.tar", [fields_of(name) for name in NAMES])
    tar(tmp_path / "in/1.tar", [fields_of("n00"), fields_of("n04")])
    source = open_source(str(tmp_path / "in")).with_labels()
    assert source.classes == ("n00", "n01", "n02", "n03", "n04")
    assert by_name(source) == [*NAMES, "n00", "n04"]


def test_text_is_a_label_where_all_of_it_is_numbers_and_nothing_else_is_one(tmp_path: Path) -> None:
    numbers = open_source(str(tar(tmp_path / "0.tar", [{"txt": b"%d" % i} for i in range(4)]))).with_labels()
    assert (numbers.label_field, numbers.classes) == ("txt", None)
    assert [label for label, _ in read(numbers)] == [0, 1, 2, 3]
    captions = [{"txt": b"42"}, {"txt": b"a dog"}, {"txt": b"7"}]
    for samples in (captions, [{"txt": b"42", **as_json(label=i)} for i in range(3)]):
        source = open_source(str(tar(tmp_path / "1.tar", samples))).with_labels()
        assert source.label_field is None
        assert 42 not in [label for label, _ in read(source)]


def test_what_was_looked_for_is_said_where_there_is_no_label(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", [{"label": b"3", **as_json(breed="pug", width=96)}, {"txt": b"a pug"}])
    (remark,) = open_source(str(path)).with_labels().remarks
    assert "looked for KEY.cls and label, cls, class" in remark
    assert "4: json:breed, json:width, label, txt; --label-field" in remark
    assert extract(tiny_config(path, tmp_path / "c", None, views_only=True)).remarks == [remark]
    assert open_source(str(tar(tmp_path / "1.tar", [{"cls": b"3"}]))).with_labels().remarks == ()


@pytest.mark.parametrize("labelled", [0, 1, 2])
def test_labels_are_found_though_the_first_shards_have_none(tmp_path: Path, labelled: int) -> None:
    for i in range(3):
        tar(tmp_path / f"in/{i}.tar", [{"cls": b"dog"}, {"cls": b"cat"}] if i == labelled else [{}])
    assert open_source(str(tmp_path / "in")).with_labels().classes == ("cat", "dog")


def test_settings_of_labels_need_photos() -> None:
    for name in ("classes", "label_field"):
        with pytest.raises(ConfigError, match=f"not used: --{name.replace('_', '-')}; no photos were given"):
            ExtractConfig(cache="c", base="mae", **{name: "x"})


def test_the_user_says_where_labels_are(tmp_path: Path) -> None:
    samples = [{"txt": name.encode(), **as_json(label=i, breed=f"b{i}")} for i, name in enumerate(NAMES)]
    path = str(tar(tmp_path / "0.tar", samples))
    assert by_name(open_source(path, label_field="txt").with_labels()) == list(NAMES)
    assert by_name(open_source(path, label_field="breed").with_labels()) == ["b0", "b1", "b2", "b3"]
    assert [label for label, _ in read(open_source(path).with_labels())] == [0, 1, 2, 3]
    nowhere = read(open_source(path, label_field="brede").with_labels())
    assert {note for _, note in nowhere} == {"it has no field 'brede', which holds the labels"}


def test_of_numbers_and_names_the_rarer_are_not_understood(tmp_path: Path) -> None:
    few_names = [{"cls": b"3"}, {"cls": b"4"}, {"cls": b"dog"}]
    source = open_source(str(tar(tmp_path / "0.tar", few_names))).with_labels()
    assert source.classes is None
    assert [label for label, _ in read(source)] == [3, 4, None]
    few_numbers = [{"cls": b"3"}, {"cls": b"cat"}, {"cls": b"dog"}]
    source = open_source(str(tar(tmp_path / "1.tar", few_numbers))).with_labels()
    assert source.classes == ("cat", "dog")
    assert read(source)[0] == (None, "its label '3' is none of the 2 classes")


def test_a_class_list_may_be_given_and_may_hold_numbers(tmp_path: Path) -> None:
    path = str(tar(tmp_path / "0.tar", [{"cls": c} for c in (b"007", b"dog", b"360", b"7")]))
    source = open_source(path, classes=("dog", "007", "cat", "360"))
    assert [label for label, _ in read(source.with_labels())] == [1, 0, 3, None]


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\nä ö\n",
        "\ufeffcat\r\ndog\r\nä ö",
        '["cat", "dog", "ä ö"]',
        '{"dog": 1, "cat": 0, "ä ö": 2}',
        '{"1": "dog", "0": "cat", "2": "ä ö"}',
        '{"0": ["cat", "domestic cat"], "1": ["dog", "hound"], "2": ["ä ö", ""]}',
    ],
)
def test_class_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes").write_text(text, encoding="utf-8")
    assert read_classes(str(tmp_path / "classes")) == ("cat", "dog", "ä ö")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "cat\n\ndog",
        "cat\ndog\ncat",
        "[1, 2]",
        '{"cat": 1, "dog": 2}',
        '{"cat": [3], "dog": 1}',
        '{"0": "cat", "1%s": "dog"}' % ("0" * 5000),
        "[",
        "[" * 9999,
    ],
)
def test_class_files_that_cannot_be_meant(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_classes(str(tmp_path / "classes"))
    assert caught.value.where == str(tmp_path / "classes")
    assert caught.value.todo
    with pytest.raises(ConfigError, match="cannot read the classes"):
        read_classes(str(tmp_path / "none"))


def test_captions_are_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_lists, "MOST_CLASSES", 10)
    path = tar(tmp_path / "0.tar", [{"txt": b"caption %d" % i + b" words"} for i in range(11)])
    with pytest.raises(LayoutError, match="more than 10 names"):
        open_source(str(path), label_field="txt").with_labels()


# ---- in a cache ----------------------------------------------------------------------------------------------


def test_names_in_a_cache_are_its_own_from_the_first_run_on(tmp_path: Path) -> None:
    tar(tmp_path / "in/0.tar", [{"cls": name.encode()} for name in NAMES])
    config = tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, views=1)
    made = extract(config)
    assert made.labels.names == ["n01", "n02", "n03"]
    assert (made.labels.labelled, made.labels.classes) == (4, 3)
    cache = open_cache(tmp_path / "c")
    assert cache.identity["classes"] == ["n01", "n02", "n03"]
    assert cache.views_record(Unit(0, 0, 0)).labels == [1, 0, 2, 0]
    # another view: the stored list is used, nothing is looked for again
    extract(tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, views=2))
    assert open_cache(tmp_path / "c").views_record(Unit(0, 0, 1)).labels == [1, 0, 2, 0]
    # other lists are refused, and name what differs
    (tmp_path / "names").write_text("n01\nn02\nn03\nn09\n")
    with pytest.raises(IdentityError, match="classes: only asked are 1: n09"):
        extract(tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, classes=str(tmp_path / "names")))
    with pytest.raises(IdentityError, match="label_field: stored null, asked"):
        extract(tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, label_field="txt"))
    # parts and ranks find the same list, each for itself
    for part in ("1/2", "2/2"):
        config = tiny_config(tmp_path / "in", tmp_path / "p", None, views_only=True, views=1, part=part)
        assert extract(config).labels.names == ["n01", "n02", "n03"]


def test_a_cache_says_where_its_labels_are(tmp_path: Path) -> None:
    tar(tmp_path / "in/0.tar", [{"txt": b"%d" % i} for i in range(3)])
    extract(tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, views=1))
    assert open_cache(tmp_path / "c").identity["label_field"] == "txt"
    extract(tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, views=2))
    cache = open_cache(tmp_path / "c")
    assert cache.views_record(Unit(0, 0, 0)).labels == cache.views_record(Unit(0, 0, 1)).labels == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "identity", "text"),
    [
        ([], {}, "not known before the photos are read"),
        ([], {"classes": ["a", "b"]}, "2: a, b"),
        ([None, None], {}, "no labels"),
        ([None], {"label_field": "x"}, "no labels (in the field x)"),
        ([3, 1, 3], {}, "2, labels are numbers from 1 to 3"),
        ([3, None], {"label_field": "txt"}, "1 (in the field txt), labels are numbers from 3 to 3; 1 of 2 photos"),
        ([0, 1], {"classes": ["cat", "dog"]}, "2: cat, dog"),
        ([0, 6], {"classes": list("abcdefg")}, "7: a, b, c, d, e, ...; 2 of them have photos"),
    ],
)
def test_classes_in_one_line(labels: list[int | None], identity: dict[str, Any], text: str) -> None:
    counter = LabelCounter()
    counter.add(labels)
    told = classes_text(counter.counts(identity))
    assert told.startswith(text)
    assert (told.endswith((" has no label", " have no label"))) == (None in labels and labels != [None] * len(labels))


def test_extract_and_info_print_the_same_line(tmp_path: Path) -> None:
    tar(tmp_path / "in/0.tar", [{"cls": b"dog"}, {"cls": b"cat"}, {"cls": b"\xff"}])
    write_tar(tmp_path / "in/1.tar", [("README", b"r"), ("p.jpg", JPEG)])
    config = tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True)
    for told in (extract_text(extract(config), False, config, True), info_text(info(str(tmp_path / "c")))):
        assert "classes      2: cat, dog; 2 of 4 photos have no label" in told.splitlines()
        assert "passed over  files without a suffix (1)" in told.splitlines()
