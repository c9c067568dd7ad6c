"""Photos of every kind become upright RGB or a SourceError; stored crops are the same bytes every time."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image, features

from tec_cache.cache.pixels import JpegSettings, decode_crop, encode_crop, resize
from tec_cache.data.images import decode_photo
from tec_cache.data.stored import MAX_PIXELS
from tec_cache.errors import ConfigError, SourceError
from tests.conftest import encoded, photo


def decoded(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    result = decode_photo(encoded(image, kind, **options)).image
    assert result.mode == "RGB"
    return np.asarray(result)


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


# ---- kinds of photos -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_rgb_is_unchanged(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decoded(photo(1), kind, **options), np.asarray(photo(1)))


def test_jpeg_is_near() -> None:
    assert mean_difference(decoded(photo(2), "JPEG", quality=95), np.asarray(photo(2))) < 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "PPM"])
def test_greyscale_has_three_equal_channels(kind: str) -> None:
    pixels = decoded(photo(3, mode="L"), kind)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    assert mean_difference(pixels[..., 0], np.asarray(photo(3, mode="L"))) < (2 if kind == "JPEG" else 1e-9)


def test_black_and_white() -> None:
    image = photo(3).convert("1")
    np.testing.assert_array_equal(decoded(image)[..., 0], np.asarray(image) * 255)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 256, 2))])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_gives_the_colours_of_the_palette(kind: str, transparency: int | bytes | None) -> None:
    if kind == "GIF" and isinstance(transparency, bytes):
        transparency = 5  # GIF knows one transparent colour only
    image = photo(4).quantize(128)
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(decoded(image, kind, **options), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("LA", "PNG")])
def test_alpha_is_dropped_not_blended(mode: str, kind: str) -> None:
    image = photo(5, mode=mode)
    image.putalpha(Image.fromarray(np.tile(np.arange(80, dtype=np.uint8) * 3, (60, 1))))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decoded(image, kind, **options), np.asarray(image.convert("RGB")))
    assert decoded(image, kind, **options)[:, 0].max() > 0  # wholly transparent, and still there


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted(kind: str) -> None:
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    assert mean_difference(decoded(photo(6, mode="CMYK"), kind, **options), np.asarray(photo(6))) < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_right_to_one_level(kind: str) -> None:
    values = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    pixels = decoded(Image.fromarray(values), kind).astype(float)
    assert np.abs(pixels - values[..., None] / 257).max() <= 1
    assert pixels.min() == 0
    assert pixels.max() == 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_a_dark_sixteen_bit_photo_stays_dark(kind: str) -> None:
    # no value above 255: what the file says counts, not the brightest pixel
    assert decoded(Image.fromarray(np.full((4, 6), 200, np.uint16)), kind).max() == 1


@pytest.mark.parametrize("dtype", ["int32", "float32"])
@pytest.mark.parametrize("factor", [1 / 255, 1, 257])
def test_samples_without_a_defined_range_are_refused_by_name(dtype: str, factor: float) -> None:
    """A TIFF of them may mean 0 to 1, 0 to 255 or anything: no guess from the values, which would differ by photo."""
    values = (np.arange(24).reshape(4, 6) * 10 * factor).astype(dtype)
    name = {"int32": "32-bit signed", "float32": "32-bit floating-point"}[dtype]
    with pytest.raises(SourceError, match=f"{name} samples, whose black and white"):
        decode_photo(encoded(Image.fromarray(values), "TIFF"))


def test_floating_point_is_refused_in_a_portable_map() -> None:
    with pytest.raises(SourceError, match="floating-point"):
        decode_photo(b"Pf\n2 2\n-1.0\n" + np.array([0.1, 0.2, 0.3, 1.0], "<f4").tobytes())


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_white_is_zero(bits: int) -> None:
    values = (np.arange(48).reshape(6, 8) * (5 if bits == 8 else 1285)).astype(f"uint{bits}")
    data = bytearray(encoded(Image.fromarray(values), "TIFF"))
    data[data.index(struct.pack("<HHI", 262, 3, 1)) + 8] = 0
    np.testing.assert_array_equal(
        np.asarray(decode_photo(bytes(data)).image)[..., 0], 255 - np.arange(48).reshape(6, 8) * 5
    )


def test_one_pixel() -> None:
    for kind in ("PNG", "JPEG", "GIF"):
        assert decoded(Image.new("RGB", (1, 1), (200, 200, 200)), kind).shape == (1, 1, 3)


def test_the_first_frame_of_an_animation_counts() -> None:
    data = encoded(photo(7), "WEBP", save_all=True, append_images=[photo(8)], lossless=True)
    np.testing.assert_array_equal(np.asarray(decode_photo(data).image), np.asarray(photo(7)))


def test_avif_where_pillow_was_built_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: False)
    for brands in (b"avif\0\0\0\0mif1", b"mif1\0\0\0\0avif"):
        with pytest.raises(SourceError, match="built without AVIF"):
            decode_photo(b"\0\0\0\x14ftyp" + brands)
    with pytest.raises(SourceError, match="not an image of a known format"):
        decode_photo(b"\0\0\0\x14ftypheic\0\0\0\0mif1")


# ---- orientation ---------------------------------------------------------------------------------------------

# How a camera that writes this orientation has stored the upright picture (EXIF: "0th row, 0th column").
STORED_AS = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_comes_out_upright(kind: str, orientation: int) -> None:
    upright = np.asarray(photo(9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright)))
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    pixels = decoded(stored, kind, exif=exif, **options)
    assert mean_difference(pixels, upright) < (2 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decoded(photo(9), "PNG", exif=exif), np.asarray(photo(9)))


def test_sixteen_bits_are_turned_too() -> None:
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decoded(Image.fromarray(np.ascontiguousarray(np.rot90(values))), "PNG", exif=exif)
    assert np.abs(pixels[..., 0] - values / 257).max() <= 1


# ---- what is no photo ----------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG that claims to be large and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def broken() -> dict[str, bytes]:
    whole = encoded(photo(10), "JPEG")
    cases = {
        "empty": b"",
        "text": b"this is a letter, not a photo\n" * 20,
        "zeros": bytes(1000),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>',
        "jpeg, two bytes": whole[:2],
        "jpeg, header only": whole[:300],
        "jpeg, half": whole[: len(whole) // 2],
        "jpeg, all but the end": whole[:-20],
    }
    for kind in ("PNG", "GIF", "BMP", "WEBP", "TIFF"):
        data = encoded(photo(10), kind)
        cases[f"{kind}, half"] = data[: len(data) // 2]
    bent = bytearray(encoded(photo(10), "PNG"))
    bent[len(bent) // 2] ^= 1
    cases["PNG, one bit"] = bytes(bent)
    return cases


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", broken())
def test_what_is_no_whole_image_is_a_source_error(name: str) -> None:
    data = broken()[name]
    with pytest.raises(SourceError, match=r"not (a whole|an) image") as caught:
        decode_photo(data)
    # this text goes into the records of a cache: one line, and the same each time
    assert "\n" not in caught.value.what
    assert "0x" not in caught.value.what  # an address in memory


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000), (1, 100_000_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    with pytest.raises(SourceError, match=r"pixels|exceeds limit") as caught:
        decode_photo(png(width, height))
    assert "\n" not in caught.value.what


def test_the_largest_photo_is_opened() -> None:
    """Just at the limit the size is no reason: this one fails for holding nothing."""
    with pytest.raises(SourceError, match="not a whole image") as caught:
        decode_photo(png(MAX_PIXELS // 3, 3))
    assert "pixels are too many" not in caught.value.what


def test_decoding_leaves_the_warning_filters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They belong to the whole process, and photos are decoded in threads that would undo each other's changes."""
    seen: list[object] = []
    real = Image.open

    def spy(stream: io.BytesIO, formats: Sequence[str]) -> Image.Image:
        seen.append(list(warnings.filters))
        return real(stream, formats=formats)

    monkeypatch.setattr(Image, "open", spy)
    before = list(warnings.filters)
    for kind in ("WEBP", "TIFF", "PNG"):
        decode_photo(encoded(photo(1), kind))
    assert seen == [before] * 3


def test_formats_that_start_other_programs_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    called: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: called.append(a))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(SourceError, match="not an image of a known format"):
        decode_photo(eps)
    assert not called


# ---- stored crops --------------------------------------------------------------------------------------------


def crop(seed: int, size: int = 48) -> np.ndarray:
    return np.asarray(photo(seed, size, size))


def test_encoding_is_deterministic_and_follows_the_settings() -> None:
    plain = JpegSettings()
    assert (plain.quality, plain.subsampling) == (90, "420")
    assert encode_crop(crop(1), plain) == encode_crop(crop(1).copy(), plain)
    mirrored = crop(1)[:, ::-1]  # not contiguous
    assert encode_crop(mirrored, plain) == encode_crop(np.ascontiguousarray(mirrored), plain)
    assert encode_crop(crop(2), plain) != encode_crop(crop(1), plain)
    sizes = {s: len(encode_crop(crop(1), JpegSettings(subsampling=s))) for s in ("444", "422", "420")}
    assert sizes["444"] > sizes["422"] > sizes["420"]
    assert len(encode_crop(crop(1), JpegSettings(quality=50))) < sizes["420"]


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_a_stored_crop_is_rgb_and_near(subsampling: str) -> None:
    settings = JpegSettings(quality=95, subsampling=subsampling)
    data = encode_crop(crop(3), settings)
    pixels = decode_crop(data)
    assert pixels.dtype == np.uint8
    assert mean_difference(pixels, crop(3)) < 4
    assert mean_difference(pixels[..., ::-1], crop(3)) > 20  # the channels are not swapped
    with Image.open(io.BytesIO(data)) as other:
        assert (other.format, other.mode) == ("JPEG", "RGB")
        assert mean_difference(np.asarray(other), pixels) < 3
    np.testing.assert_array_equal(decode_crop(data), pixels)


def test_a_damaged_crop_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode_crop(b"not a JPEG")


@pytest.mark.parametrize("changes", [{"quality": 0}, {"quality": 101}, {"subsampling": "411"}])
def test_settings_that_cannot_be_meant(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        JpegSettings(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "height"), [(80, 60), (7, 90), (1, 1), (31, 33), (32, 32), (32, 8)])
def test_resize_is_pillows_bicubic(width: int, height: int) -> None:
    image = photo(4, width, height)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    pixels = resize(np.asarray(image), 32)
    assert pixels.shape == (32, 32, 3)
    np.testing.assert_array_equal(pixels, expected)
