"""A damaged photo is an error, or its pixels are those of the whole one: no grey or black in place of a picture."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tec_cache.data.images import decode_photo
from tec_cache.data.tiff import read_directory
from tec_cache.errors import SourceError
from tests.conftest import encoded, photo

FEW = settings(derandomize=True, max_examples=25, deadline=None)


def noisy(seed: int, width: int = 320, height: int = 240, mode: str = "RGB") -> Image.Image:
    """A picture with the detail of a photo: its data are as long, and no part of them is like another."""
    smooth = np.asarray(photo(seed, width, height)).astype(float)
    noise = np.random.default_rng(seed).normal(0, 12, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).convert(mode)


KINDS = {
    "standard tables": encoded(noisy(1), "JPEG", quality=88),
    "tables of its own": encoded(noisy(2), "JPEG", quality=88, optimize=True),
    "no subsampling": encoded(noisy(3), "JPEG", quality=70, subsampling=0),
    "restart markers": encoded(noisy(4), "JPEG", quality=88, restart_marker_blocks=7),
    "grey": encoded(noisy(5, mode="L"), "JPEG", quality=88),
    "CMYK": encoded(noisy(6, mode="CMYK"), "JPEG", quality=75),
    "progressive": encoded(noisy(7), "JPEG", quality=88, progressive=True),
}
WHOLE = {name: np.asarray(decode_photo(data).image) for name, data in KINDS.items()}
SEQUENTIAL = [name for name in KINDS if name != "progressive"]


def first_data(data: bytes) -> int:
    """Where the data of the first scan begin."""
    head = data.index(b"\xff\xda") + 2
    return head + int.from_bytes(data[head : head + 2], "big")


def is_error_or_whole(name: str, damaged: bytes) -> bool:
    try:
        pixels = np.asarray(decode_photo(damaged).image)
    except SourceError as error:
        return error.what.startswith("not a whole image: ") and "\n" not in error.what
    return np.array_equal(pixels, WHOLE[name])


# ---- JPEG ------------------------------------------------------------------------------------------------------


@FEW
@given(name=st.sampled_from(list(KINDS)), place=st.floats(0, 0.999), ends=st.booleans())
def test_a_jpeg_that_is_cut_and_may_end_with_an_end_marker(name: str, place: float, ends: bool) -> None:
    data = KINDS[name]
    at = int(first_data(data) + place * (len(data) - first_data(data)))
    assert is_error_or_whole(name, data[:at] + (b"\xff\xd9" if ends else b""))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("missing", [3, 4, 5, 10, 30])
def test_a_jpeg_whose_last_bytes_are_missing(name: str, missing: int) -> None:
    for end in (b"", b"\xff\xd9"):
        with pytest.raises(SourceError, match="not a whole image"):
            decode_photo(KINDS[name][:-missing] + end)


@FEW
@given(name=st.sampled_from(list(KINDS)), place=st.floats(0, 1), size=st.integers(128, 4000))
def test_a_hole_of_zeros_in_a_jpeg(name: str, place: float, size: int) -> None:
    data = KINDS[name]
    at = int(first_data(data) + place * (len(data) - 2 - size - first_data(data)))
    assert is_error_or_whole(name, data[:at] + bytes(size) + data[at + size :])


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_a_jpeg_that_ends_in_zeros(name: str, kept: float) -> None:
    """What a download leaves that had laid out the file beforehand, with and without an end marker."""
    data = KINDS[name]
    at = int(first_data(data) + kept * (len(data) - first_data(data)))
    for end in (bytes(2), data[-2:]):
        with pytest.raises(SourceError, match="not a whole image"):
            decode_photo(data[:at] + bytes(len(data) - 2 - at) + end)


def test_garbage_in_the_data_of_a_jpeg_is_noticed_but_for_chance() -> None:
    """Huffman codes find their step again: noise that holds as many blocks as what it replaced looks whole."""
    rng, unnoticed = np.random.default_rng(0), []
    for number in range(200):
        name = SEQUENTIAL[number % len(SEQUENTIAL)]
        data, size, place = KINDS[name], int(rng.integers(1000, 4000)), rng.random()
        at = int(first_data(data) + place * (len(data) - 2 - size - first_data(data)))
        noise = rng.integers(0, 255, size, dtype=np.uint8).tobytes()  # never 255: no marker
        if not is_error_or_whole(name, data[:at] + noise + data[at + size :]):
            unnoticed.append((name, at, size))
    assert len(unnoticed) <= 4, unnoticed


@FEW
@given(name=st.sampled_from(SEQUENTIAL), place=st.floats(0, 1), size=st.integers(1000, 4000))
def test_a_jpeg_of_which_a_piece_is_missing(name: str, place: float, size: int) -> None:
    data = KINDS[name]
    at = int(first_data(data) + place * (len(data) - 2 - size - first_data(data)))
    assert is_error_or_whole(name, data[:at] + data[at + size :])


def test_a_progressive_jpeg_whose_last_scans_are_missing() -> None:
    data, at, cuts = KINDS["progressive"], 0, []
    while (at := data.find(b"\xff\xda", at + 1)) > 0:
        cuts.append(data.rindex(b"\xff\xc4", 0, at) if data[at - 40 : at].find(b"\xff\xc4") >= 0 else at)
    assert len(cuts) > 5
    for cut in cuts[1:]:
        for end in (b"", b"\xff\xd9"):
            with pytest.raises(SourceError, match="not a whole image"):
                decode_photo(data[:cut] + end)


def test_a_sequential_jpeg_in_scans_of_one_component_needs_them_all() -> None:
    data = one_scan_each([(2, 2), (1, 1), (1, 1)])
    assert decode_photo(data).note == ""
    assert decode_photo(data).image.size == (61, 45)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(SourceError, match="its last scans are missing"):
        decode_photo(data[:last] + b"\xff\xd9")


@pytest.mark.parametrize("kind", [{}, {"optimize": True}, {"progressive": True}, {"subsampling": 0, "optimize": True}])
@pytest.mark.parametrize("colour", [0, 128, 255])
def test_flat_pictures_have_zeros_in_their_data_and_are_whole(kind: dict[str, object], colour: int) -> None:
    for image in (Image.new("RGB", (1200, 900), (colour, 30, 200)), Image.new("L", (1200, 900), colour)):
        image.paste(colour // 2, (100, 100, 160, 140))
        assert decode_photo(encoded(image, "JPEG", **kind)).note == ""


# what is odd about a JPEG, and takes no pixel away
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("filled", [b"\0" * 9, b"\0" * 500, b"\x55" * 40, b"\xff" * 7])
def test_a_jpeg_whose_data_a_camera_has_filled_up(name: str, filled: bytes) -> None:
    decoded = decode_photo(KINDS[name][:-2] + filled + b"\xff\xd9")
    np.testing.assert_array_equal(np.asarray(decoded.image), WHOLE[name])


@pytest.mark.parametrize("name", KINDS)
def test_a_jpeg_that_lacks_its_end_marker_only(name: str) -> None:
    decoded = decode_photo(KINDS[name][:-2])
    np.testing.assert_array_equal(np.asarray(decoded.image), WHOLE[name])
    assert "end of JPEG file" in decoded.note


@pytest.mark.parametrize("name", KINDS)
def test_what_follows_the_end_marker_does_not_matter(name: str) -> None:
    for more in (b"a trailer", bytes(1000), KINDS["grey"]):
        np.testing.assert_array_equal(np.asarray(decode_photo(KINDS[name] + more).image), WHOLE[name])


def one_scan_each(factors: list[tuple[int, int]], width: int = 61, height: int = 45) -> bytes:
    """A sequential JPEG of any sampling: each component's data are those of a grey JPEG of its size."""
    most = [max(f[i] for f in factors) for i in (0, 1)]
    grey = [
        encoded(photo(i, -(-width * f[0] // most[0]), -(-height * f[1] // most[1]), "L"), "JPEG", quality=90)
        for i, f in enumerate(factors)
    ]
    tables = grey[0][2 : grey[0].index(b"\xff\xc0")] + grey[0][grey[0].index(b"\xff\xc4") : grey[0].index(b"\xff\xda")]
    components = b"".join(bytes([i + 1, h << 4 | v, 0]) for i, (h, v) in enumerate(factors))
    frame = struct.pack(">HHBHHB", 0xFFC0, 8 + len(components), 8, height, width, len(factors)) + components
    scans = [
        b"\xff\xda\0\x08\1" + bytes([i + 1, 0, 0, 63, 0]) + data[first_data(data) : -2] for i, data in enumerate(grey)
    ]
    return b"\xff\xd8" + tables + frame + b"".join(scans) + b"\xff\xd9"


@pytest.mark.parametrize("factors", [[(4, 2), (1, 1), (1, 1)], [(3, 1), (1, 1), (1, 1)], [(1, 1), (2, 2), (2, 2)]])
def test_a_sampling_that_only_pillow_knows_is_used_and_said(factors: list[tuple[int, int]]) -> None:
    data = one_scan_each(factors)
    decoded = decode_photo(data)
    assert "rare" in decoded.note
    with Image.open(io.BytesIO(data)) as expected:
        np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(expected.convert("RGB")))


def test_a_jpeg_of_endless_scans_or_segments_is_refused_before_it_is_decoded() -> None:
    data = KINDS["progressive"]
    scan = data[data.rindex(b"\xff\xda") :][:10]
    with pytest.raises(SourceError, match="more than 500 scans"):
        decode_photo(data[:-2] + 600 * scan + b"\xff\xd9")
    for endless in (b"\xff\xfe\0\2", b"\xff\0"):
        with pytest.raises(SourceError, match="more than 10,000 segments"):
            decode_photo(data[:2] + b"\xff\xfe\0\2" + 11_000 * endless + data[2:])


# ---- PNG -------------------------------------------------------------------------------------------------------


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colours: int = 2, interlaced: int = 0) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlaced)), (b"IDAT", rows)]
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        for kind, body in [*parts, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_each_bit_of_a_png_counts() -> None:
    data = encoded(noisy(1, 24, 16), "PNG", compress_level=0)  # stored: zlib notices nothing before its end
    whole = np.asarray(decode_photo(data).image)
    for at in range(8, len(data), 7):
        bent = bytearray(data)
        bent[at] ^= 1 << at % 8
        try:
            np.testing.assert_array_equal(np.asarray(decode_photo(bytes(bent)).image), whole)
        except SourceError:
            continue


@pytest.mark.parametrize(("depth", "colours", "row"), [(8, 2, 1 + 30), (8, 6, 1 + 40), (1, 0, 1 + 2), (16, 0, 1 + 20)])
def test_a_png_whose_data_end_properly_before_its_last_row(depth: int, colours: int, row: int) -> None:
    for missing in (1, row, 4 * row):
        data = zlib.compress(bytes(8 * row - missing))
        with pytest.raises(SourceError, match="not a whole image"):
            decode_photo(png(10, 8, data, depth=depth, colours=colours))
    decode_photo(png(10, 8, zlib.compress(bytes(8 * row)), depth=depth, colours=colours))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (17, 9)])
def test_an_interlaced_png_needs_all_its_passes(size: tuple[int, int]) -> None:
    width, height = size
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    dots = [(len(range(left, width, dx)), len(range(top, height, dy))) for left, top, dx, dy in passes]
    total = sum(rows * (1 + 3 * columns) for columns, rows in dots if columns)
    assert decode_photo(png(*size, zlib.compress(bytes(total)), interlaced=1)).image.size == size
    with pytest.raises(SourceError, match="its last rows are missing"):
        decode_photo(png(*size, zlib.compress(bytes(total - 1)), interlaced=1))


def test_rows_that_inflate_to_more_than_the_picture_are_not_inflated() -> None:
    bomb = zlib.compress(bytes(64 << 20))
    tracemalloc.start()
    assert decode_photo(png(10, 8, bomb)).image.size == (10, 8)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20


# ---- other formats ---------------------------------------------------------------------------------------------


@FEW
@given(kind=st.sampled_from(["PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]), place=st.floats(0, 0.99))
def test_a_file_that_is_cut(kind: str, place: float) -> None:
    data = encoded(noisy(9, 60, 40), kind)
    whole = np.asarray(decode_photo(data).image)
    try:
        pixels = np.asarray(decode_photo(data[: int(place * len(data))]).image)
    except SourceError:
        return
    np.testing.assert_array_equal(pixels, whole)


def tiff_parts(data: bytes) -> tuple[list[int], list[int], int]:
    """Places and sizes of the strips, and where the list of places is written."""
    directory = read_directory(data)
    entry = directory.entries[273][0]
    return list(directory.numbers(273)), list(directory.numbers(279)), int.from_bytes(entry.field, "little")


@pytest.mark.parametrize("coding", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"])
def test_a_strip_of_a_tiff_that_was_never_written(coding: str) -> None:
    data = bytearray(encoded(noisy(8, 64, 64), "TIFF", compression=coding, tiffinfo={278: 16}, strip_size=64 * 3 * 16))
    places, _, where = tiff_parts(bytes(data))
    decode_photo(bytes(data))
    assert len(places) > 1
    data[where + 4 : where + 8] = bytes(4)
    with pytest.raises(SourceError, match="never written"):
        decode_photo(bytes(data))


@pytest.mark.parametrize("coding", ["tiff_adobe_deflate", "jpeg", "tiff_lzw"])
@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_hole_in_a_strip_of_a_tiff(coding: str, place: float) -> None:
    data = bytearray(encoded(noisy(8, 96, 96), "TIFF", compression=coding))
    (start,), (size,), _ = tiff_parts(bytes(data))
    at = start + int(place * (size - 300))
    data[at : at + 300] = bytes(300)
    with pytest.raises(SourceError, match="not a whole image"):
        decode_photo(bytes(data))
