"""Is a payload the file that its record names, outside and inside? Nothing is changed here."""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from tec_cache.audit.findings import DROP, Finding, unreadable
from tec_cache.cache.layout import BLOCKS, Unit, array_block, array_metadata, crop_name
from tec_cache.cache.record import Payload, TargetRecord, ViewsRecord
from tec_cache.codec import ArraySpec
from tec_cache.printable import counted
from tec_cache.store import Store
from tec_cache.tar_headers import StrictHeader

MOST_LABEL_BYTES = 64
"""Of a label in a tar of crops: a number."""
MOST_ENTRY_BYTES = 256
"""Of a file's entry in the list of a zip: 46, and its name."""
MOST_METADATA_BYTES = 1 << 20
"""Of an array's zarr.json."""

PIECE = 8 << 20
"""Bytes read from a store at once; a payload is never held in memory whole."""


def check_payload(
    store: Store, payload: Payload | None, record: str, unit: Unit | str, inside: Callable[[IO[bytes]], str] | None
) -> list[Finding]:
    """Check that a payload is there with the right size and, given `inside`, its SHA-256 and what that says of it."""
    if payload is None:
        return []
    problem = ""
    try:
        size = store.size(payload.name)
        if size is None:
            problem = "is gone"
        elif size != payload.size:
            problem = f"has {size:,} bytes, its record says {payload.size:,}"
        elif inside is not None:
            with _opened(store, payload) as (stream, sha256):
                if sha256 != payload.sha256:
                    problem = "is damaged: its SHA-256 does not fit"
                else:
                    problem = sensible(lambda: inside(stream))
    except FileNotFoundError:
        problem = "is gone"
    except OSError as error:
        return [unreadable(payload.name, unit, error, record)]
    return [Finding("payload", payload.name, str(unit), problem, DROP, (record, payload.name))] if problem else []


@contextmanager
def _opened(store: Store, payload: Payload) -> Iterator[tuple[IO[bytes], str]]:
    """Open a payload for reading and seeking; give its SHA-256 too. A remote one lies on the local disk meanwhile."""
    if store.folder is not None:
        with open(store.place(payload.name), "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            yield stream, sha256
        return
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as copy:
        for offset in range(0, payload.size, PIECE):
            (data,) = store.read_ranges(payload.name, [(offset, min(PIECE, payload.size - offset))])
            digest.update(data)
            copy.write(data)
        copy.seek(0)
        yield copy, digest.hexdigest()


def _crc32(stream: IO[bytes], offset: int, size: int) -> int:
    """Return the CRC-32 of some bytes, which may be many."""
    stream.seek(offset)
    crc = 0
    while size > 0 and (data := stream.read(min(PIECE, size))):
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc


def _directory_bytes(stream: IO[bytes]) -> int:
    """Return the bytes of a zip's list of files, which zipfile reads whole; it ends as ours do, without a comment."""
    end = stream.seek(0, 2)
    stream.seek(max(0, end - 98))
    tail = stream.read(98)  # 56 bytes and 20 more for many files or long ones, and 22 for all
    if tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise zipfile.BadZipFile("it does not end as a zip")
    if tail[-42:-38] == b"PK\6\7":
        return int.from_bytes(tail[-58:-50], "little") if tail[-98:-94] == b"PK\6\6" else end
    return int.from_bytes(tail[-10:-6], "little")


def sensible(check: Callable[[], str]) -> str:
    """Run a check; content of the wrong kind altogether is a problem too, not a crash of ours."""
    try:
        return check()
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, struct.error) as error:
        return f"makes no sense: {type(error).__name__}: {error}"
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        return f"cannot be opened: {error}"


def tar_problem(stream: IO[bytes], record: ViewsRecord, unit: Unit) -> str:
    """Compare the members of a tar with the record: names and order, positions, sizes, CRC-32, labels."""
    names = [crop_name(key, unit.view) for key in record.keys]
    found: list[tuple[str, int, int]] = []
    labels: dict[tuple[str, str], bytes] = {}
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=StrictHeader) as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header
            name, _, kind = info.name.rpartition(".")
            if info.type != tarfile.REGTYPE or len(found) + len(labels) > 2 * len(names):
                return "holds other files than crops and their labels"
            if kind == "jpg":
                found.append((name, info.offset_data, info.size))
            elif info.size > MOST_LABEL_BYTES:
                return f"holds a label of {info.size:,} bytes"
            else:
                stream.seek(info.offset_data)
                labels[name, kind] = stream.read(info.size)
    if found != list(zip(names, record.offsets, record.sizes, strict=True)):
        return "holds other crops, or in another order or place, than the record says"
    wanted = {(n, "cls"): str(x).encode() for n, x in zip(names, record.labels, strict=True) if x is not None}
    if labels != wanted:
        return "holds other labels than the record says"
    for key, offset, size, crc in zip(record.keys, record.offsets, record.sizes, record.crc32, strict=True):
        if _crc32(stream, offset, size) != crc:
            return f"crop {key!r} does not fit the record's CRC-32"
    return ""


def zip_problem(stream: IO[bytes], record: TargetRecord, arrays: Mapping[str, ArraySpec] | None) -> str:
    """Compare the arrays of a zip with the record: rows, blocks, positions, sizes, CRC-32."""
    chunks_named = sum(len(blocks) for blocks in record.blocks.values())
    if _directory_bytes(stream) > (chunks_named + len(record.blocks) + 1) * MOST_ENTRY_BYTES:
        return "lists more files than the record's blocks"
    with zipfile.ZipFile(stream) as archive:
        chunks = {info.filename: info for info in archive.infolist() if BLOCKS in info.filename}
        for array, blocks in record.blocks.items():
            about = archive.getinfo(array_metadata(array))
            if about.compress_type != zipfile.ZIP_STORED or about.file_size > MOST_METADATA_BYTES:
                return f"the metadata of {array} is packed, or has {about.file_size:,} bytes"
            metadata: dict[str, Any] = json.loads(archive.read(about))
            row = list(arrays[array].shape) if arrays is not None else metadata["shape"][1:]
            if metadata["shape"] != [record.count, *row]:
                return f"{array} has the shape {metadata['shape']}, not {[record.count, *row]}"
            for number, (position, size, crc) in enumerate(blocks):
                info = chunks.pop(array_block(array, number, len(row)))
                stream.seek(info.header_offset + 26)
                start = info.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))
                if (start, info.file_size, _crc32(stream, position, size)) != (position, size, crc):
                    return f"block {number} of {array} is not what the record says"
    return f"{counted(len(chunks), 'block')} in the zip, but not in the record" if chunks else ""
