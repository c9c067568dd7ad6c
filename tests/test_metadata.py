"""A photo whose pixels are whole is used, whatever its metadata are; the orientation counts where it can be read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from tec_cache.data.images import decode_photo
from tec_cache.data.tiff import read_directory
from tec_cache.errors import SourceError
from tests.conftest import encoded, photo

MANY = settings(derandomize=True, max_examples=60, deadline=None)
IMAGE = photo(1, 40, 24)
ORIENTATION = 0x0112
Tag = tuple[int, int, int, bytes]

# what a picture stored with this orientation looks like upright
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}


def block(tags: list[Tag], order: str = "<", tail: bytes = b"") -> bytes:
    """A TIFF header and one directory, as an EXIF block holds them."""
    rows = b"".join(struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + rows + struct.pack(f"{order}I", 0) + tail


def turn(orientation: int, order: str = "<") -> Tag:
    return (ORIENTATION, 3, 1, struct.pack(f"{order}HH", orientation, 0))


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    plain = encoded(IMAGE, "JPEG")
    parts = [b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments]
    return plain[:2] + b"".join(parts) + plain[2:]


def png_with(*chunks: tuple[bytes, bytes], behind: bool = False, wrong: int = 0) -> bytes:
    """A PNG with chunks more; wrong: changes their checksums."""
    plain = encoded(IMAGE, "PNG")
    parts = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)
        for kind, body in chunks
    )
    at = len(plain) - 12 if behind else 33
    return plain[:at] + parts + plain[at:]


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(decode_photo(data).image)


PLAIN = {kind: pixels_of(encoded(IMAGE, kind)) for kind in ("JPEG", "PNG", "WEBP", "TIFF")}


def with_exif(kind: str, exif: bytes) -> bytes:
    if kind == "JPEG":
        return jpeg_with((0xE1, b"Exif\0\0" + exif))
    return png_with((b"eXIf", exif)) if kind == "PNG" else encoded(IMAGE, "WEBP", exif=b"Exif\0\0" + exif)


tags = st.tuples(
    st.integers(0, 0xFFFF).filter(lambda tag: tag != ORIENTATION),
    st.integers(0, 20),
    st.one_of(st.integers(0, 4), st.integers(0, 2**32 - 1)),
    st.binary(min_size=4, max_size=4),
)


@MANY
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    before=st.lists(tags, max_size=6),
    after=st.lists(tags, max_size=6),
    orientation=st.integers(1, 8),
    order=st.sampled_from("<>"),
    tail=st.binary(max_size=40),
    headers=st.integers(0, 2),
)
def test_an_orientation_among_broken_fields_is_applied(
    kind: str, before: list[Tag], after: list[Tag], orientation: int, order: str, tail: bytes, headers: int
) -> None:
    exif = b"Exif\0\0" * headers + block([*before, turn(orientation, order), *after], order, tail)
    np.testing.assert_array_equal(pixels_of(with_exif(kind, exif)), TURNED[orientation](PLAIN[kind]))


@MANY
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    fields=st.lists(tags, max_size=6),
    cut=st.integers(0, 90),
    noise=st.binary(max_size=60),
)
def test_no_block_keeps_a_photo_from_being_used(kind: str, fields: list[Tag], cut: int, noise: bytes) -> None:
    for exif in (noise, (block([*fields, turn(6)]) + noise)[:cut]):
        pixels = pixels_of(with_exif(kind, exif))
        assert any(np.array_equal(pixels, turned(PLAIN[kind])) for turned in TURNED.values())


BROKEN = {
    "text": [(ORIENTATION, 2, 2, b"6\0\0\0")],
    "rational": [(ORIENTATION, 5, 1, struct.pack("<I", 8))],
    "two values": [(ORIENTATION, 3, 2, struct.pack("<HH", 6, 8))],
    "two entries": [turn(6), turn(8)],
    "no value": [(ORIENTATION, 3, 0, bytes(4))],
    "far away": [(ORIENTATION, 3, 900, struct.pack("<I", 70000))],
    "meaningless": [turn(99)],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", BROKEN)
def test_an_orientation_that_cannot_be_read_leaves_the_photo_as_it_is_stored_and_is_said(kind: str, name: str) -> None:
    decoded = decode_photo(with_exif(kind, block(BROKEN[name])))
    np.testing.assert_array_equal(np.asarray(decoded.image), PLAIN[kind])
    assert "left as it is stored" in decoded.note


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_a_photo_without_metadata_has_no_note(kind: str) -> None:
    assert decode_photo(encoded(IMAGE, kind)).note == ""


@MANY
@given(st.lists(st.tuples(st.sampled_from([*range(0xE0, 0xF0), 0xFE]), st.binary(max_size=60)), max_size=5))
def test_no_segment_of_metadata_matters_in_a_jpeg(segments: list[tuple[int, bytes]]) -> None:
    np.testing.assert_array_equal(pixels_of(jpeg_with(*segments)), PLAIN["JPEG"])


@pytest.mark.parametrize(
    ("marker", "body"),
    [
        (0xE2, b"ICC_PROFILE\0\5\2" + b"cut"),
        (0xE2, b"ICC_PROFILE\0\0\0"),
        (0xE2, b"MPF\0II*\0" + b"\xff" * 30),
        (0xED, b"Photoshop 3.0\0008BIM\4\4\0\0\xff\xff\xff\xff"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta \xff\xfe tiff:Orientation='x'"),
        (0xE0, b"JFIF\0"),
        (0xEE, b"Adobe"),
        (0xEE, b"Ado"),
    ],
)
def test_known_segments_that_are_broken_do_not_matter_in_a_jpeg(marker: int, body: bytes) -> None:
    np.testing.assert_array_equal(pixels_of(jpeg_with((marker, body))), PLAIN["JPEG"])


def test_bytes_between_the_segments_of_a_jpeg_are_passed_over_and_said() -> None:
    plain = encoded(IMAGE, "JPEG")
    at = plain.index(b"\xff\xdb")
    decoded = decode_photo(plain[:at] + b"what a bad editor left" + plain[at:])
    np.testing.assert_array_equal(np.asarray(decoded.image), PLAIN["JPEG"])
    assert "22 extraneous bytes" in decoded.note


def test_texts_that_inflate_to_megabytes_do_not_matter_in_a_png() -> None:
    bomb = zlib.compress(bytes(3_000_000))
    chunks = [(b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"b\0\1\0\0\0" + bomb), (b"iCCP", b"c\0\0" + bomb)]
    for behind in (False, True):
        np.testing.assert_array_equal(pixels_of(png_with(*chunks, behind=behind)), PLAIN["PNG"])


@MANY
@given(
    chunks=st.lists(
        st.tuples(
            st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"pHYs", b"tRNS", b"cHRM", b"acTL", b"eXIf"]),
            st.binary(max_size=30),
        ),
        max_size=4,
    ),
    behind=st.booleans(),
    wrong=st.sampled_from([0, 1]),
)
def test_no_chunk_of_metadata_matters_in_a_png(chunks: list[tuple[bytes, bytes]], behind: bool, wrong: int) -> None:
    decoded = decode_photo(png_with(*chunks, behind=behind, wrong=wrong))
    np.testing.assert_array_equal(np.asarray(decoded.image), PLAIN["PNG"])
    assert not (chunks and wrong) or "is damaged" in decoded.note


@MANY
@given(st.lists(tags.filter(lambda tag: tag[0] > 532 and tag[0] != 34675), max_size=8), st.integers(1, 8))
def test_no_tag_of_metadata_matters_in_a_tiff(more: list[Tag], orientation: int) -> None:
    data = encoded(IMAGE, "TIFF")
    own = [
        (tag, entry.kind, entry.num_values, entry.field)
        for tag, (entry,) in read_directory(data).entries.items()
        if tag < 282 or tag == 284
    ]
    broken = [
        (282, 2, 3, b"72\0\0"),
        (283, 5, 1, b"\xff\xff\xff\xff"),
        (0x8825, 2, 4, b"abc\0"),
        (0x8769, 9, 1, b"\xfb\xff\xff\xff"),
    ]
    rows = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in sorted([*own, turn(orientation), *broken, *more]))
    directory = struct.pack("<H", len(own) + 1 + len(broken) + len(more)) + rows + bytes(4)
    changed = data[:4] + struct.pack("<I", len(data)) + data[8:] + directory
    np.testing.assert_array_equal(pixels_of(changed), TURNED[orientation](PLAIN["TIFF"]))


@pytest.mark.parametrize("place", [0, 2, 4, 8, 10])
def test_the_exif_block_of_an_avif_does_not_matter(place: int) -> None:
    if not features.check("avif"):  # older wheels of Pillow
        with pytest.raises(SourceError, match="built without AVIF"):
            decode_photo(b"\0\0\0\x14ftypavif\0\0\0\0avif")
        return
    exif = Image.Exif()
    exif[0x010F], exif[ORIENTATION] = "a camera", 6
    whole = encoded(IMAGE, "AVIF", exif=exif, quality=100, subsampling="4:4:4")
    assert decode_photo(whole).image.size == (24, 40)
    at = whole.rindex(b"\0\x2a") - 2 + place
    broken = whole[:at] + b"\xff" * 8 + whole[at + 8 :]
    np.testing.assert_array_equal(pixels_of(broken), pixels_of(whole))


# ---- other places where an orientation stands --------------------------------------------------------------------

XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="8"/>'


def in_xmp(kind: str, exif: bytes = b"") -> bytes:
    if kind == "WEBP":
        return encoded(IMAGE, kind, xmp=XMP, **({"exif": exif} if exif else {}))
    if kind == "PNG":
        chunks = [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), *([(b"eXIf", exif)] if exif else [])]
        return png_with(*chunks)
    xmp = (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)
    return jpeg_with(xmp, *([(0xE1, b"Exif\0\0" + exif)] if exif else []))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_xmp_counts_where_exif_names_no_orientation(kind: str) -> None:
    np.testing.assert_array_equal(pixels_of(in_xmp(kind)), TURNED[8](PLAIN[kind]))
    np.testing.assert_array_equal(pixels_of(in_xmp(kind, block([]))), TURNED[8](PLAIN[kind]))
    np.testing.assert_array_equal(pixels_of(in_xmp(kind, block([turn(3)]))), TURNED[3](PLAIN[kind]))


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt"])
def test_an_exif_block_that_a_png_holds_as_text(kind: bytes) -> None:
    exif = b"Exif\0\0" + block([turn(6)])
    text = b"\nexif\n%8d\n" % len(exif) + b"\n".join(
        exif.hex()[i : i + 72].encode() for i in range(0, 2 * len(exif), 72)
    )
    body = b"Raw profile type exif\0" + (b"\0" + zlib.compress(text) if kind == b"zTXt" else text)
    np.testing.assert_array_equal(pixels_of(png_with((kind, body))), TURNED[6](PLAIN["PNG"]))
    ours = Image.open(io.BytesIO(png_with((kind, body))))
    assert ours.getexif()[ORIENTATION] == 6  # as Pillow reads it
