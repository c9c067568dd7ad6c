"""The view plan: a pure function, drawn like torchvision's RandomResizedCrop; the generator and names beneath it."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from tec_cache.cache.layout import Unit, crop_name
from tec_cache.cache.pixels import JpegSettings, decode_crop, resize
from tec_cache.data.photos import Photo
from tec_cache.data.views import View, ViewPlan, cut_photo
from tec_cache.errors import ConfigError
from tec_cache.rng import bits, key64, permutation, uniform
from tests.conftest import encoded, photo

PLAN = ViewPlan(size=32)

# ---- purity --------------------------------------------------------------------------------------------------

# Do not change these to make a test pass: every cache that was ever made depends on them.
PINNED: list[tuple[ViewPlan, tuple[str, str, int, int, int], View]] = [
    (ViewPlan(), ("train-000000.tar", "n01440764_10026", 0, 500, 375), View(35, 3, 444, 372, False)),
    (ViewPlan(), ("train-000000.tar", "n01440764_10026", 1, 500, 375), View(25, 25, 359, 344, False)),
    (ViewPlan(), ("a/ü.tar", "x.y", 7, 333, 1000), View(16, 206, 242, 299, False)),
    (
        ViewPlan(seed=5, scale=(0.08, 0.5), ratio=(0.5, 2), flip=0.9),
        ("s", "k", 3, 640, 480),
        View(274, 253, 259, 199, True),
    ),
]


@pytest.mark.parametrize(("plan", "arguments", "expected"), PINNED)
def test_pinned_views(plan: ViewPlan, arguments: tuple[str, str, int, int, int], expected: View) -> None:
    assert plan.view(*arguments) == expected


def test_views_do_not_depend_on_order_process_or_global_generators() -> None:
    asked = [("s.tar", f"photo {i}", number, 64 + i, 48) for i in range(20) for number in range(3)]
    forward = [PLAN.view(*arguments) for arguments in asked]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert [PLAN.view(*arguments) for arguments in reversed(asked)] == forward[::-1]
    assert [ViewPlan(size=32).view(*arguments) for arguments in asked] == forward
    program = (
        "import json, sys; from tec_cache.data.views import ViewPlan\n"
        "print(json.dumps([ViewPlan(size=32).view(*a) for a in json.load(sys.stdin)]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
    )
    assert [View(*values) for values in json.loads(other.stdout)] == forward


def test_every_part_of_the_key_matters() -> None:
    here = PLAN.view("s.tar", "k", 0, 5000, 4000)
    others = [
        ViewPlan(size=32, seed=1).view("s.tar", "k", 0, 5000, 4000),
        PLAN.view("t.tar", "k", 0, 5000, 4000),
        PLAN.view("s.tar", "l", 0, 5000, 4000),
        PLAN.view("s.tar", "k", 1, 5000, 4000),
        PLAN.view("s.tar", "0", 0, 5000, 4000),
        PLAN.view("s.tark", "", 0, 5000, 4000),
    ]
    assert len({here, *others}) == 7
    # the size of a stored crop changes no box
    assert ViewPlan(size=224).view("s.tar", "k", 0, 5000, 4000) == here


# ---- distribution --------------------------------------------------------------------------------------------

DRAWS = 4000


def boxes_here(plan: ViewPlan, width: int, height: int) -> np.ndarray:
    return np.array([plan.view("s.tar", f"{i}", i % 5, width, height) for i in range(DRAWS)], dtype=np.float64)


def boxes_of_torchvision(plan: ViewPlan, width: int, height: int) -> np.ndarray:
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    draws = [RandomResizedCrop.get_params(image, list(plan.scale), list(plan.ratio)) for _ in range(DRAWS)]
    return np.array([(left, top, w, h) for top, left, h, w in draws], dtype=np.float64)


MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "area": lambda box: box[:, 2] * box[:, 3],
    "ratio": lambda box: box[:, 2] / box[:, 3],
    "left": lambda box: box[:, 0],
    "top": lambda box: box[:, 1],
    "right margin": lambda box: box[:, 0] + box[:, 2],
    "width": lambda box: box[:, 2],
}


@pytest.mark.parametrize(
    ("plan", "width", "height"),
    [
        (ViewPlan(), 500, 375),
        (ViewPlan(scale=(0.08, 1.0)), 333, 500),
        (ViewPlan(scale=(0.3, 0.9), ratio=(0.5, 1.5)), 900, 300),  # many tries fail, some photos fall back
    ],
)
def test_boxes_are_drawn_like_torchvisions(plan: ViewPlan, width: int, height: int) -> None:
    ours, theirs = boxes_here(plan, width, height), boxes_of_torchvision(plan, width, height)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= width).all()
    assert (ours[:, 1] + ours[:, 3] <= height).all()
    assert (ours[:, 2:4] >= 1).all()
    for name, measure in MEASURES.items():
        result = stats.ks_2samp(measure(ours), measure(theirs))
        assert result.pvalue > 1e-3, f"{name}: {result}"
    # where a box may lie does not depend on how large it is, up to what its size leaves over
    free = ours[ours[:, 2] < width * 0.9]
    place = free[:, 0] / (width - free[:, 2])
    assert abs(stats.spearmanr(place, free[:, 2]).statistic) < 0.06


def test_the_comparison_sees_another_distribution() -> None:
    """The test above is worth something: a small change of the scale fails it."""
    ours = boxes_here(ViewPlan(scale=(0.25, 1.0)), 500, 375)
    theirs = boxes_of_torchvision(ViewPlan(), 500, 375)
    assert stats.ks_2samp(MEASURES["area"](ours), MEASURES["area"](theirs)).pvalue < 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_flips_come_as_often_as_asked_and_alone(probability: float) -> None:
    boxes = boxes_here(ViewPlan(flip=probability), 500, 375)
    flips = int(boxes[:, 4].sum())
    assert stats.binomtest(flips, DRAWS, probability).pvalue > 1e-3
    if 0 < probability < 1:
        flipped = boxes[:, 4] == 1
        assert stats.ks_2samp(boxes[flipped, 0], boxes[~flipped, 0]).pvalue > 1e-3
        assert stats.ks_2samp(boxes[flipped, 2], boxes[~flipped, 2]).pvalue > 1e-3
    np.testing.assert_array_equal(boxes[:, :4], boxes_here(ViewPlan(), 500, 375)[:, :4])


def test_views_of_one_photo_are_independent() -> None:
    pairs = np.array([[PLAN.view("s", f"{i}", n, 900, 900).width for n in (0, 1)] for i in range(DRAWS)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("width", "height"), [(1000, 1), (1, 1000), (1000, 10), (3, 200), (700, 701), (2, 1), (1, 2), (1, 1)]
)
def test_photos_that_no_try_fits_fall_back_as_in_torchvision(width: int, height: int) -> None:
    # the area is the whole photo: only its own ratio would fit, and these are outside of what is allowed
    plan = ViewPlan(scale=(1.0, 1.0), ratio=(2.0, 2.0) if width / height < 1.5 else (0.4, 0.5))
    top, left, h, w = RandomResizedCrop.get_params(Image.new("L", (width, height)), list(plan.scale), list(plan.ratio))
    views = [plan.view("s", "k", number, width, height) for number in range(40)]
    # torchvision rounds the box of a photo of few pixels down to nothing, here one pixel is left
    h, w = max(1, h), max(1, w)
    assert {view[:4] for view in views} == {((width - w) // 2, (height - h) // 2, w, h)}
    assert (left, top) == ((width - w) // 2, (height - h) // 2) or min(width, height) <= 2
    assert {view.flip for view in views} == {True, False}


@pytest.mark.parametrize(("width", "height"), [(1000, 1), (1, 1000), (1, 1), (2, 3), (5, 1000)])
def test_extreme_photos_with_the_default_plan(width: int, height: int) -> None:
    for number in range(50):
        left, top, w, h, _ = PLAN.view("s", "k", number, width, height)
        assert 0 <= left <= left + w <= width
        assert 0 <= top <= top + h <= height
        assert w >= 1
        assert h >= 1
    if max(width, height) == 1000:
        expected = RandomResizedCrop.get_params(Image.new("L", (width, height)), [0.2, 1.0], [3 / 4, 4 / 3])
        assert (top, left, h, w) == expected


# ---- cutting -------------------------------------------------------------------------------------------------


def test_cut_takes_the_box_and_resizes_it() -> None:
    image = photo(1, 90, 70)
    pixels = PLAN.cut(image, View(10, 5, 64, 40, False))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, resize(np.asarray(image)[5:45, 10:74], 32))
    whole = ViewPlan(size=48).cut(image, View(3, 4, 48, 48, False))
    np.testing.assert_array_equal(whole, np.asarray(image)[4:52, 3:51])


@pytest.mark.parametrize("flip", [False, True])
def test_cut_gives_the_pixels_of_arrays_that_are_cropped_resized_and_mirrored_one_by_one(flip: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(60):
        width, height = (int(n) for n in generator.integers(1, 400, 2))
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        left, top = int(generator.integers(width)), int(generator.integers(height))
        w, h = int(generator.integers(1, width - left + 1)), int(generator.integers(1, height - top + 1))
        size = int(generator.choice([1, 7, 32, 224, min(w, h)]))
        crop = np.ascontiguousarray(pixels[top : top + h, left : left + w])
        expected = np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC))
        cut = ViewPlan(size=size).cut(Image.fromarray(pixels), View(left, top, w, h, flip))
        assert np.array_equal(cut, expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize("plan", [PLAN, ViewPlan(size=7), ViewPlan(size=64)])
def test_flip_mirrors_left_and_right(plan: ViewPlan) -> None:
    image = photo(2, 90, 70)
    plain, mirrored = (plan.cut(image, View(10, 5, 60, 40, flip)) for flip in (False, True))
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    assert (mirrored != plain).any()
    assert mirrored.shape == (plan.size, plan.size, 3)
    assert mirrored.flags.c_contiguous


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (64, 64), (1, 1), (1, 9), (9, 1), (2, 2)])
def test_the_centre_crop_is_seven_eighths_of_the_shorter_side(width: int, height: int) -> None:
    plan = ViewPlan(crop="center", size=32)
    view = plan.view("s", "k", 0, width, height)
    edge = max(1, round(min(width, height) * 7 / 8))
    assert (view.width, view.height, view.flip) == (edge, edge, False)
    assert 0 <= width - edge - 2 * view.left <= 1
    assert 0 <= height - edge - 2 * view.top <= 1
    assert plan.view("t", "l", 3, width, height) == view
    assert plan.cut(photo(1, width, height), view).shape == (32, 32, 3)


def test_cut_photo_gives_the_views_that_were_asked_for() -> None:
    image = photo(3, 90, 70)
    settings = JpegSettings(quality=95, subsampling="444")
    item = Photo("k", encoded(image, "PNG"), None)
    crops, problem, _ = cut_photo(item, "s.tar", PLAN, [2, 0], settings)
    assert problem == ""
    for number, crop in zip([2, 0], crops, strict=True):
        pixels = PLAN.cut(image, PLAN.view("s.tar", "k", number, 90, 70))
        assert np.abs(decode_crop(crop).astype(int) - pixels).mean() < 4
    assert cut_photo(item, "s.tar", PLAN, [0, 1, 2], settings)[0][2] == crops[0]
    assert cut_photo(item, "s.tar", PLAN, [], settings) == ([], "", "")


def test_cut_photo_says_why_there_are_no_views() -> None:
    settings = JpegSettings()
    assert cut_photo(Photo("k", b"", 1, "it is gone"), "s", PLAN, [0], settings) == ([], "it is gone", "")
    assert cut_photo(Photo("k", b"text", 1), "s", PLAN, [0], settings) == (
        [],
        "not an image of a known format",
        "",
    )


def test_a_cut_uses_the_upright_photo() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = encoded(photo(4, 60, 100).rotate(90, expand=True), "PNG", exif=exif)
    upright = encoded(photo(4, 60, 100), "PNG")
    settings = JpegSettings()
    assert cut_photo(Photo("k", lying, None), "s", PLAN, [0, 1], settings) == cut_photo(
        Photo("k", upright, None), "s", PLAN, [0, 1], settings
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": "middle"},
        {"size": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.5, 1.5)},
        {"ratio": (2.0, 1.0)},
        {"ratio": (0.0, 1.0)},
        {"flip": 1.5},
        {"flip": -0.1},
        {"scale": (float("nan"), 1.0)},
        {"flip": float("nan")},
    ],
)
def test_plans_that_cannot_be_meant(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        ViewPlan(**changes)  # type: ignore[arg-type]
    assert caught.value.todo


# ---- the generator -------------------------------------------------------------------------------------------


def test_pinned_numbers() -> None:
    assert key64("view", 0, "s", "k", 1) == 11772872274966534398
    assert bits(1, 3).tolist() == [10451216379200822465, 13757245211066428519, 17911839290282890590]
    assert permutation(7, 8).tolist() == [1, 5, 7, 0, 4, 6, 3, 2]


def test_keys_tell_tuples_apart() -> None:
    parts = [(), ("",), ("", ""), ("a", "bc"), ("ab", "c"), ("abc",), ("a", "b", "c"), ("c", "ab"), ("ü",), ("a\0",)]
    assert len({key64(*part) for part in parts}) == len(parts)
    assert len({key64("k", i) for i in range(20_000)}) == 20_000
    assert all(0 <= key64("k", i) < 2**64 for i in range(100))


def test_numbers_are_uniform_and_independent() -> None:
    keys = np.array([key64("photo", i) for i in range(2000)], dtype=np.uint64)
    numbers = uniform(keys, 10)
    assert numbers.shape == (2000, 10)
    assert numbers.dtype == np.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    for column in range(10):
        assert stats.kstest(numbers[:, column], "uniform").pvalue > 1e-4
    off_diagonal = np.corrcoef(numbers.T) - np.eye(10)
    assert np.abs(off_diagonal).max() < 0.1
    # also for keys in a row, as a counter gives them
    assert stats.kstest(uniform(np.arange(20_000, dtype=np.uint64), 1).ravel(), "uniform").pvalue > 1e-3


def test_numbers_do_not_depend_on_how_many_are_asked() -> None:
    keys = np.array([3, 2**64 - 1, 0], dtype=np.uint64)
    many = uniform(keys, 7)
    np.testing.assert_array_equal(uniform(keys, 3), many[:, :3])
    np.testing.assert_array_equal(uniform(keys[:1], 7), many[:1])
    np.testing.assert_array_equal(uniform(2**64 - 1, 7), many[1])
    np.testing.assert_array_equal(bits(keys.reshape(3, 1), 7)[:, 0], bits(keys, 7))


def test_a_permutation_is_one() -> None:
    for count in (0, 1, 2, 1000):
        assert sorted(permutation(5, count).tolist()) == list(range(count))
    orders = [tuple(permutation(key, 5).tolist()) for key in range(3000)]
    assert len(set(orders)) == 120
    first = np.bincount([order[0] for order in orders], minlength=5)
    assert stats.chisquare(first).pvalue > 1e-3


# ---- names of crops ------------------------------------------------------------------------------------------

AWKWARD = ["", ".", "..", "/", "//", "a/", "/a", "a//b", "a/b", "a/./b", "../../etc/passwd", "a.b"]
AWKWARD += ["a%2Eb", "a%2eb", "%", "%25", "%2F", "a%2Fb", "a-v00", "a-v00-v01", "ü", "u\u0308", "\U0001f4f7"]
AWKWARD += [" ", "a b", "\t", "\n", "\0", "a\\b", "C:\\x", "~", "-", "--x", "*", "?", "A", "a", "é.jpg", "_"]
AWKWARD += ["__key__", "x" * 300, "ü" * 90, ".hidden", "a/.b", "n01.5_x", "con/aux", "a:b", "a,b", "{a,b}"]


def random_keys(count: int) -> list[str]:
    draw = random.Random(0)
    alphabet = "ab./%-v0 2FEeü\\\U0001f4f7"
    keys = {"".join(draw.choices(alphabet, k=draw.randrange(1, 9))) for _ in range(count)}
    return sorted(keys - set(AWKWARD)) + AWKWARD


def test_names_of_crops_are_injective_and_safe() -> None:
    keys = random_keys(20_000)
    assert len(set(keys)) == len(keys)
    made = {crop_name(key, view): (key, view) for key in keys for view in (0, 1, 12, 100)}
    assert len(made) == 4 * len(keys)
    for name in made:
        assert name.isascii()
        assert name.isprintable()
        assert not set(name) & set(". \\:*?\"'<>|{}")
        assert all(name.split("/")), name  # no part is empty, so none is absolute either


def test_names_of_crops_are_readable_where_keys_are_plain() -> None:
    assert crop_name("n01440764/n01440764_10026", 3) == "n01440764/n01440764_10026-v03"
    assert crop_name("n01.5_x", 0) == "n01%2E5_x-v00"


def test_webdataset_reads_each_name_as_one_key(tmp_path: Path) -> None:
    keys = random_keys(600)
    expected = [crop_name(key, view) for key in keys for view in (0, 1)]
    path = tmp_path / "crops.tar"
    with wds.TarWriter(str(path), encoder=False) as writer:
        for name in expected:
            writer.write({"__key__": name, "jpg": name.encode(), "cls": b"1"})
    samples = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == expected
    assert [sample["jpg"].decode() for sample in samples] == expected
    assert all(set(sample) - {"__key__", "__url__", "__local_path__"} == {"jpg", "cls"} for sample in samples)


def test_names_of_crops_unpack_below_their_folder(tmp_path: Path) -> None:
    stream = io.BytesIO()
    names = [crop_name(key, 0) + ".jpg" for key in AWKWARD if len(key) < 80]
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert unpacked == set(names)


@pytest.mark.parametrize("unit", [Unit(0, 0, 0), Unit(123, 2, 3), Unit(1_234_567, 1000, 100)])
def test_names_of_units_are_read_back(unit: Unit) -> None:
    assert Unit.parse(str(unit)) == unit


@pytest.mark.parametrize("text", ["", "1.0-v0", "000001.000-v00.tar", "000001.000.v00", "000001.000-v00\n", "x"])
def test_other_names_are_no_units(text: str) -> None:
    with pytest.raises(ValueError, match="not the name of a unit"):
        Unit.parse(text)
