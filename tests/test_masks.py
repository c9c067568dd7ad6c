"""Masks: what their bytes say, where they lie, how they move with their photos, and what is counted in the end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score, recall_score

from pipelines.segment import AUGMENTATION
from tec_cache.data.masks import decode_mask, encode_mask
from tec_cache.data.source import open_source
from tec_cache.errors import ConfigError, SourceError
from tec_cache.labelled.joint import JitteredCrop, joint_transform, whole_transform
from tec_cache.labelled.making import seed_generators
from tec_cache.labelled.masked import MaskedIndex, highest_value, index_masked_photos
from tec_cache.mask_values import NO_CLASS, Values
from tec_cache.segment.recipes import RECIPES, SegmentRecipe, recipe_for
from tec_cache.segment.scores import Scores, confusion
from tests.conftest import encoded, photo, write_tar


def augmentation(recipe: SegmentRecipe, size: int) -> Any:
    return joint_transform(size, **PLAIN, crop=recipe.crop, **{name: getattr(recipe, name) for name in AUGMENTATION})


PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """Write a greyscale PNG of any depth by hand: Pillow writes 1, 8 and 16 bits only."""
    import struct
    import zlib

    height, width = values.shape
    rows = b""
    for row in values.astype(np.uint32):
        if bits == 16:
            rows += b"\0" + row.astype(">u2").tobytes()
        else:
            flags = (row[:, None] >> np.arange(bits - 1, -1, -1)) & 1
            rows += b"\0" + np.packbits(flags.astype(np.uint8).ravel()).tobytes()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_masks_of_every_depth_give_the_numbers_that_are_stored(bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 2**bits, (7, 13))
    np.testing.assert_array_equal(decode_mask(grey_png(values, bits)), values)


@pytest.mark.parametrize("colours", [2, 3, 16, 200])
def test_palettes_give_numbers_and_not_colours(colours: int) -> None:
    rng = np.random.default_rng(colours)
    values = rng.integers(0, colours, (9, 11)).astype(np.uint8)
    image = Image.fromarray(values, "P")
    image.putpalette(rng.integers(0, 256, 3 * colours, dtype=np.uint8).tobytes())
    np.testing.assert_array_equal(decode_mask(encoded(image, "PNG")), values)


def test_the_code_of_imagenet_s() -> None:
    values = np.array([[0, 1, 255, 256, 919, 1000]])
    image = np.stack([values % 256, values // 256, np.zeros_like(values)], axis=-1).astype(np.uint8)
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(image), "PNG")), values)
    np.testing.assert_array_equal(decode_mask(encode_mask(values)), values)
    small = np.array([[0, 3], [255, 7]])
    assert Image.open(io.BytesIO(encode_mask(small))).mode == "L"
    np.testing.assert_array_equal(decode_mask(encode_mask(small)), small)


def rgb16_png() -> bytes:
    """An RGB picture of 16 bits: Pillow would keep the upper eight, all zero."""
    import struct
    import zlib

    rows = b"".join(b"\0" + np.full((4, 3), 5, ">u2").tobytes() for _ in range(4))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_what_is_no_mask_is_refused_with_the_reason() -> None:
    blue = np.zeros((4, 4, 3), np.uint8)
    blue[..., 2] = 9
    cases = {
        "no PNG": encoded(photo(0)),
        "has blue in it": encoded(Image.fromarray(blue), "PNG"),
        "mode RGBA": encoded(Image.new("RGBA", (4, 4)), "PNG"),
        "16 bits for each colour": rgb16_png(),
        "mode LA": encoded(Image.new("LA", (4, 4)), "PNG"),
        "not a whole PNG": encoded(Image.new("L", (40, 40)), "PNG")[:60],
    }
    for reason, data in cases.items():
        with pytest.raises(SourceError, match=reason):
            decode_mask(data)


def test_classes_are_all_values_but_the_ignored_one() -> None:
    beyond = Values(ignore=11, num_classes=11)
    assert beyond.classes(np.array([[0, 10, 11]])).tolist() == [[0, 10, NO_CLASS]]
    first = Values(ignore=0, num_classes=150)
    assert first.classes(np.array([[0, 1, 150]])).tolist() == [[NO_CLASS, 0, 149]]
    within = Values(ignore=255, num_classes=300)
    classes = within.classes(np.array([[254, 255, 256, 300]]))
    assert classes.tolist() == [[254, NO_CLASS, 255, 299]]
    assert within.values(np.array([254, 255, 299])).tolist() == [254, 256, 300]
    with pytest.raises(ConfigError, match=r"the value 11; the 11 classes have up to 10, and 255 is ignored") as told:
        Values(ignore=255, num_classes=11).classes(np.array([[11]]))
    assert "--ignore 11" in told.value.todo


def pair(number: int, classes: int = 4, size: tuple[int, int] = (80, 60)) -> tuple[bytes, bytes]:
    """A photo whose colours are its classes, and its mask: halves and quarters."""
    width, height = size
    rng = np.random.default_rng(number)
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = rng.integers(1, classes)
    mask[height // 2 :, : width // 2] = rng.integers(0, classes)
    pixels = np.stack([mask * 60 + 20] * 3, axis=-1).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "PNG"), encoded(Image.fromarray(mask), "PNG")


def write_pairs(path: Path, count: int, start: int = 0, **options: int) -> Path:
    """Write a shard of photos with masks."""
    members = []
    for number in range(start, start + count):
        picture, mask = pair(number, **options)
        members += [(f"{number:05d}.png", picture), (f"{number:05d}.seg.png", mask)]
    return write_tar(path, members)


def indexed(place: Path) -> MaskedIndex:
    return index_masked_photos(open_source(str(place)).with_masks())


def test_masks_are_found_beside_their_photos_in_tars_and_in_folders(tmp_path: Path) -> None:
    tar = write_pairs(tmp_path / "tars" / "a.tar", 5)
    for number in range(5):
        picture, mask = pair(number)
        folder = tmp_path / "folder" / ("one" if number % 2 else "two")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}.png").write_bytes(picture)
        (folder / f"{number:05d}.seg.png").write_bytes(mask)
    for place in (tar, tmp_path / "folder"):
        found = indexed(place)
        assert len(found) == 5
        assert not found.passed_over
        for i, key in enumerate(found.keys):
            picture, mask = pair(int(Path(key).stem))
            assert found.read(i) == picture
            np.testing.assert_array_equal(found.mask(i), decode_mask(mask))
        assert highest_value(found, ignore=255) == max(int(found.mask(i).max()) for i in range(5))


def test_a_photo_without_a_mask_is_left_out_and_named_and_a_mask_without_a_photo_counted(tmp_path: Path) -> None:
    picture, mask = pair(0)
    members = [("a.png", picture), ("a.seg.png", mask), ("b.png", picture), ("c.seg.png", mask)]
    found = indexed(write_tar(tmp_path / "a.tar", members))
    assert found.keys == ["a"]
    assert "photo 'b': no mask" in str(found.unlabelled)
    assert found.passed_over == {"masks without a photo": 1}
    with pytest.raises(SourceError, match="no photo has a mask"):
        indexed(write_tar(tmp_path / "none.tar", [("b.png", picture)]))


def test_without_masks_being_asked_for_they_are_passed_over_as_before(tmp_path: Path) -> None:
    from tec_cache.data.passed_over import PassedOver

    source = open_source(str(write_pairs(tmp_path / "a.tar", 3)))
    counts = PassedOver()
    assert len(list(source.shards[0].photos(counts))) == 3
    assert counts == {"images beside a sample's own": 3}


def test_a_mask_of_another_shape_is_refused_and_one_of_another_size_is_scaled(tmp_path: Path) -> None:
    picture, _ = pair(0)
    _, turned = pair(0, size=(60, 80))
    _, half = pair(0, size=(40, 30))
    _, small = pair(0, size=(5, 4))  # a sixteenth, rounded
    for name, mask in (("turned", turned), ("half", half), ("small", small)):
        from dataclasses import replace

        tar = write_tar(tmp_path / f"{name}.tar", [("a.png", picture), ("a.seg.png", mask)])
        index = replace(indexed(tar), values=Values(255, 4))
        look = augmentation(RECIPES["small"], 32)
        if name == "turned":
            with pytest.raises(SourceError, match=r"its mask has 60 x 80 pixels, the photo 80 x 60: .*EXIF"):
                index.example(0, look)
        else:
            image, classes = index.example(0, look)
            assert (image.shape, classes.shape) == ((3, 32, 32), (32, 32))


@pytest.mark.parametrize("crop", ["resized", "jittered"])
def test_photo_and_mask_move_together(crop: str) -> None:
    """Colours tell classes, so wherever a pixel is well inside a region, the mask must say the photo's class."""
    from dataclasses import replace

    recipe = replace(RECIPES["small"], crop=crop, colour=(0.0, 0.0, 0.0, 0.0), grey=0.0, blur=0.0)
    look = augmentation(recipe, 48)
    seen, flipped = 0, 0
    for number in range(40):
        seed_generators(number)
        picture, mask = pair(number)
        image, classes = look(Image.open(io.BytesIO(picture)).convert("RGB"), torch.from_numpy(decode_mask(mask)))
        assert (image.shape, classes.shape, classes.dtype) == ((3, 48, 48), (48, 48), torch.int64)
        known = classes != NO_CLASS
        colours = (classes * 60 + 20) / 255
        off = (image[0] - colours).abs() > 0.02
        # only a seam between regions, where the photo is interpolated, may differ
        assert (off & known).float().mean() < 0.12
        seen += int(known.sum())
        flipped += int(classes[:, 0].float().mean() > classes[:, -1].float().mean())
        if not known.all():
            assert (image[:, ~known] == 0).all(), "what is padded is of no class"
    assert seen > 40 * 48 * 48 * 0.4
    assert 0 < flipped < 40


def test_a_crop_of_one_class_is_avoided_where_others_can_be_seen() -> None:
    mask = torch.zeros(64, 64, dtype=torch.int32)
    mask[:, :32] = 1
    from torchvision import tv_tensors

    crop = JitteredCrop(32, (2.0, 2.0))
    shares = []
    for number in range(30):
        torch.manual_seed(number)
        _, part = crop(Image.new("RGB", (64, 64)), tv_tensors.Mask(mask))
        shares.append(float(torch.bincount(part.long().flatten(), minlength=2).max() / part.numel()))
    assert max(shares) < 0.75


def test_judging_sees_the_whole_photo_in_whole_patches_and_the_mask_as_it_is() -> None:
    look = whole_transform(224, 16, whole=True, **PLAIN)
    classes = torch.zeros(375, 500, dtype=torch.int32)
    image, kept = look(Image.new("RGB", (500, 375)), classes)
    assert image.shape == (3, 256, 336)  # 256 x 341, by the nearest patch
    assert (kept.shape, kept.dtype) == ((375, 500), torch.int64)
    image, _ = look(Image.new("RGB", (300, 900)), torch.zeros(900, 300, dtype=torch.int32))
    assert image.shape == (3, 768, 256)
    windows = whole_transform(512, 16, whole=False, **PLAIN)
    image, _ = windows(Image.new("RGB", (683, 512)), torch.zeros(512, 683, dtype=torch.int32))
    assert image.shape == (3, 512, 683)


def test_scores_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth, said = rng.integers(-1, 6, (3, 40, 30)), rng.integers(0, 6, (3, 40, 30))
    said[said == 4] = 3  # a class that is never predicted
    truth[truth == 5] = 2  # one that no mask has
    tables = [confusion(torch.from_numpy(t), torch.from_numpy(s), 7) for t, s in zip(truth, said, strict=True)]
    scores = Scores.of(torch.stack(tables).sum(0))
    known = truth >= 0
    t, s = truth[known], said[known]
    assert scores.iou[6] is None, "neither in the masks nor predicted"
    expected = jaccard_score(t, s, average=None, labels=range(6))
    np.testing.assert_allclose(scores.iou[:6], expected, rtol=1e-12)
    assert scores.mean_iou == pytest.approx(jaccard_score(t, s, average="macro", labels=range(6)), rel=1e-12)
    assert scores.pixel_accuracy == pytest.approx(accuracy_score(t, s), rel=1e-12)
    assert scores.accuracy[5] is None
    np.testing.assert_allclose(scores.accuracy[:5], recall_score(t, s, average=None, labels=range(5)), rtol=1e-12)
    assert sum(scores.pixels) == known.sum()
    with pytest.raises(ValueError, match="no pixel"):
        Scores.of(torch.zeros(3, 3, dtype=torch.int64))


def test_recipes_are_the_published_ones_and_are_chosen_with_a_reason() -> None:
    """evaluation.md: ImageNet-S and ADE20K."""
    one, tuned, ade = RECIPES["imagenet-s"], RECIPES["imagenet-s-ft"], RECIPES["ade20k"]
    assert (one.epochs, one.batch_size, one.base_lr, one.layer_decay, one.warmup_epochs) == (100, 256, 5e-4, 0.60, 5)
    assert (one.weight_decay, one.drop_path, one.min_lr, one.ignore, one.size) == (0.05, 0.1, 1e-6, 1000, 224)
    assert (one.crop_scale, one.colour, one.grey, one.blur) == ((0.14, 1.0), (0.8, 0.8, 0.8, 0.2), 0.2, 0.5)
    assert (tuned.base_lr, tuned.layer_decay) == (1e-4, 0.40)
    steps = ade.epochs * 20_210 / ade.batch_size
    assert ade.base_lr * ade.batch_size / 256 == pytest.approx(1e-4)
    assert steps == pytest.approx(160_000, rel=0.005)
    assert ade.warmup_epochs * 20_210 / ade.batch_size == pytest.approx(1500, rel=0.005)
    assert (ade.schedule, ade.layer_decay, ade.size, ade.ignore) == ("linear", 0.65, 512, 0)
    assert recipe_for(None, None, 9_190).name == "imagenet-s"
    assert recipe_for(None, "upernet", 20_210).name == "ade20k"
    assert recipe_for(None, "linear", 367).name == "small"
    with pytest.raises(ConfigError, match="ade20k"):
        recipe_for("ade20", None, 1)


def test_masks_of_a_compressed_tar_are_those_of_the_plain_one(tmp_path: Path) -> None:
    import gzip

    plain = indexed(write_pairs(tmp_path / "a.tar", 5))
    (tmp_path / "b").mkdir()
    packed = tmp_path / "b" / "a.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    found = indexed(packed)
    assert found.keys == plain.keys
    for number in range(5):
        np.testing.assert_array_equal(found.mask(number), plain.mask(number))
        assert found.read(number) == plain.read(number)
