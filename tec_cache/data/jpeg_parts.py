"""The segments of a JPEG: where they lie, what the header says, and the file without what no pixel depends on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

SOI, EOI, SOS, DHT = 0xD8, 0xD9, 0xDA, 0xC4
PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}
_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE
_PIXELS = frozenset(range(0xC0, 0xD0)) | {0xDB, 0xDC, 0xDD, SOS}
"""Frames, tables of quantization, Huffman and arithmetic coding, lines, restart intervals, scans."""

# within a scan only a stuffed zero, a restart marker or a fill byte may follow 0xFF
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_NOT_FILL = re.compile(rb"[^\xff]")

MOST_SEGMENTS = 10_000
"""Ten times what a long colour profile and an extended XMP block take; a hostile file has millions."""


class Segment(NamedTuple):
    """A marker, where it begins, and where its body lies; the data of a scan lie behind the body."""

    marker: int
    start: int
    body: int
    end: int


@dataclass(frozen=True)
class Header:
    """What stands before the first scan."""

    width: int
    height: int
    frame: int
    """Marker of the frame, which names the coding process."""
    components: bytes
    """Number of each component, as scans name them."""
    exif: bytes
    xmp: bytes
    scan: Segment
    """Head of the first scan."""


class Scan(NamedTuple):
    """The head of a scan, and where its data lie."""

    head: Segment
    start: int
    end: int


def segments(data: bytes) -> Iterator[Segment]:
    """Yield the segments up to the end marker, or to where the file ends. Bytes between them are passed over.

    Raises ValueError where there are too many.
    """
    at = 2
    for _ in range(MOST_SEGMENTS):
        start = data.find(b"\xff", at)
        match = _NOT_FILL.search(data, start) if start >= 0 else None
        if match is None:
            return
        marker, at = data[match.start()], match.end()
        if marker == 0:  # no marker, but bytes that are passed over
            continue
        if marker in (1, SOI, EOI) or 0xD0 <= marker <= 0xD7:
            yield Segment(marker, start, at, at)
            if marker == EOI:
                return
            continue
        end = at + int.from_bytes(data[at : at + 2], "big")
        if end < at + 2 or end > len(data):
            return
        yield Segment(marker, start, at + 2, end)
        at = end
        if marker == SOS:
            match = _END_OF_SCAN.search(data, at)
            at = match.start() if match else len(data)
    raise ValueError(f"it has more than {MOST_SEGMENTS:,} segments")


def read_header(data: bytes) -> Header:
    """Read what stands before the first scan. Raises ValueError where there is no frame or no scan."""
    frame: Segment | None = None
    exif = xmp = b""
    for segment in segments(data):
        marker, _, body, end = segment
        if marker in _FRAMES:
            frame = segment
        elif marker == _APP1 and not exif and data.startswith(b"Exif\0", body, end):
            exif = data[body:end]
        elif marker == _APP1 and not xmp and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", body, end):
            xmp = data[body:end]
        elif marker == SOS:
            if frame is None or frame.end - frame.body < 6 + 3 * data[frame.body + 5]:
                break
            height, width = (int.from_bytes(data[frame.body + at : frame.body + at + 2], "big") for at in (1, 3))
            components = data[frame.body + 6 : frame.end : 3][: data[frame.body + 5]]
            return Header(width, height, frame.marker, components, exif, xmp, segment)
    raise ValueError("it ends before its picture begins")


def scans(data: bytes) -> Iterator[tuple[Scan, dict[int, int]]]:
    """Yield each scan, and which symbol each Huffman table codes by zeros alone at that point.

    The tables' numbers are their class (0: DC, 16: AC) plus their place.
    """
    zeros: dict[int, int] = {}
    head: Segment | None = None
    for segment in segments(data):
        if head is not None:
            yield Scan(head, head.end, segment.start), dict(zeros)
        head = segment if segment.marker == SOS else None
        at = segment.body
        while segment.marker == DHT and at + 17 < segment.end:
            zeros[data[at]] = data[at + 17]
            at += 17 + sum(data[at + 1 : at + 17])
    if head is not None:
        yield Scan(head, head.end, len(data)), zeros


def bare(data: bytes, *, trim: int | None = None) -> bytes:
    """Return the file reduced to what its pixels depend on, with an end marker.

    Metadata, bytes between segments and whatever follows the end marker are left out; what the JFIF and Adobe
    segments say of colours stays.
    trim: shorten a run of equal bytes at the end of the last scan to so many; None leaves it.
    """
    parts, previous = [b"\xff\xd8"], SOI
    end = 0
    for marker, start, body, stop in segments(data):
        if previous == SOS:
            parts.append(data[end:start])
        colours = (marker == _APP0 and data.startswith(b"JFIF\0", body, stop)) or (
            marker == _APP14 and data.startswith(b"Adobe", body, stop)
        )
        if marker in _PIXELS or colours:
            parts.append(data[start:stop])
        previous, end = marker, stop
    if previous == SOS:
        parts.append(data[end:])
    if trim is not None and parts[-1]:
        last = parts[-1][-1:]
        parts[-1] = parts[-1].rstrip(last) + last * trim
    return b"".join([*parts, b"\xff\xd9"])
