"""Memory and time that data asks for: bounded by what can be meant, and refused before anything is allocated."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import resource
import shutil
import socket
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc, blosc
from safetensors.torch import save

import pipelines.extraction.make_views as make_views
from pipelines.describing.info_export import describe_export
from pipelines.extract import extract
from pipelines.unpack import unpack
from pipelines.verify import verify
from tec_cache.audit.payloads import sensible, tar_problem, zip_problem
from tec_cache.cache import layout
from tec_cache.cache.blocks import block_bytes, most_chunk_bytes, read_block, write_zip
from tec_cache.cache.frames import unpacked
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.pixels import MOST_SIDE, JpegSettings, decode_crop, encode_crop, most_crop_bytes
from tec_cache.cache.record import Payload, TargetRecord, ViewsRecord
from tec_cache.codec import ArraySpec, get_codec, most_parameter_bytes
from tec_cache.data import links, photos, tar_stream, tars
from tec_cache.data.files import LocalFile
from tec_cache.data.photos import MOST_PHOTO_BYTES, Photo
from tec_cache.data.source import open_source
from tec_cache.data.tars import TarShard
from tec_cache.documents import MOST_BYTES
from tec_cache.errors import CacheError, SourceError, StorageError, TecCacheError
from tec_cache.kinds import Kind, what_is
from tec_cache.pack.frames import MAGIC, most_member_bytes, read_members, write_member
from tec_cache.run.settings import load_settings
from tec_cache.store import MOST_WHOLE, open_store
from tec_cache.store.local import read_local, read_regular
from tec_cache.tar_headers import MOST_HEADER_BYTES
from tec_cache.weights.content import read_json
from tests import forked
from tests.conftest import encoded, photo, tiny_config, write_shards, write_tar
from tests.sealing import reseal, unsealed

UNIT = Unit(0, 0, 0)
TERABYTE = 1 << 40
FEW_BYTES = 48 << 20
"""More than any of these inputs may take, and far less than each of them asks for."""


@contextmanager
def little_memory(most: int = FEW_BYTES) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def read(path: Path) -> tuple[list[Photo], str]:
    """The photos of a tar, and why reading it ended early."""
    found = []
    try:
        for one in TarShard("x", path.stat().st_size, LocalFile(str(path))).photos():
            found.append(one)
    except SourceError as error:
        return found, error.what
    return found, ""


GOOD = encoded(photo(1))


def tar_with(path: Path, odd: bytes, *, before: int = 1, after: int = 1) -> Path:
    """A tar of sound photos around some raw blocks."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for number in range(before):
            add(tar, f"a{number}.jpg", GOOD)
    head = whole.getvalue()[: whole.getvalue().rstrip(b"\0").__len__() + 511 & ~511] if before else b""
    rest = io.BytesIO()
    with tarfile.open(fileobj=rest, mode="w") as tar:
        for number in range(after):
            add(tar, f"z{number}.jpg", GOOD)
    path.write_bytes(head + odd + rest.getvalue())
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, form: int = tarfile.GNU_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(form)


def raw_size(block: bytes, field: bytes) -> bytes:
    """Put 12 bytes into a header's size, and mend its checksum."""
    block = block[:124] + field + block[136:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def sparse_gnu(name: str, size: int) -> bytes:
    """GNU's old sparse header: one byte of data and a hole of any size."""
    block = bytearray(header(name, 512, tarfile.GNUTYPE_SPARSE))
    for at, value in ((386, 0), (398, 512), (410, size), (422, 0)):
        block[at : at + 12] = tarfile.itn(value, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    block[482] = 0
    block[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    return raw_size(bytes(block), bytes(block[124:136])) + b"\xff" * 512


def pax(name: str, fields: dict[str, str], data: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(data), fields
    return info.tobuf(tarfile.PAX_FORMAT) + data + b"\0" * (-len(data) % 512)


LARGE: dict[str, Callable[[], bytes]] = {
    "sparse, GNU": lambda: sparse_gnu("big.jpg", TERABYTE),
    "sparse, PAX 0.0": lambda: pax("big.jpg", {"GNU.sparse.size": str(TERABYTE), "GNU.sparse.numblocks": "0"}),
    "sparse, PAX 0.1": lambda: pax("big.jpg", {"GNU.sparse.size": str(TERABYTE), "GNU.sparse.map": "0,0"}),
    "sparse, PAX 1.0": lambda: pax(
        "big.jpg",
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(TERABYTE)},
        (f"1\n{TERABYTE}\n0\n".encode()).ljust(512, b"\0"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
def test_a_sparse_photo_of_a_terabyte_is_broken_and_the_others_are_read(tmp_path: Path, kind: str) -> None:
    path = tar_with(tmp_path / "x.tar", LARGE[kind]())
    with little_memory():
        found, problem = read(path)
    assert (problem, [one.key for one in found]) == ("", ["a0", "big", "z0"])
    assert [bool(one.problem) for one in found] == [False, True, False]
    assert "are more than any photo has" in found[1].problem
    assert found[0].data == found[2].data == GOOD


def test_a_large_photo_that_is_there_is_broken_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MOST_PHOTO_BYTES", 20_000)
    members = [("a.jpg", GOOD), ("b.jpg", b"\xff" * 20_001), ("c.jpg", b"\xff" * 20_000), ("d.jpg", GOOD)]
    found, problem = read(write_tar(tmp_path / "in" / "x.tar", members))
    assert problem == ""
    assert [(one.key, bool(one.problem), len(one.data)) for one in found] == [
        ("a", False, len(GOOD)), ("b", True, 0), ("c", False, 20_000), ("d", False, len(GOOD))]  # fmt: skip
    with pytest.raises(SourceError, match="photo 'b': 20,001 bytes are more than any photo has"):
        extract(tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True))
    summary = extract(tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, on_error="skip"))
    assert (summary.photos, len(summary.skipped)) == (2, 2)


def test_the_files_of_a_sample_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MOST_SAMPLE_BYTES", 5000)
    members = [("a.jpg", GOOD), *((f"a.{i}.npy", b"x" * 1000) for i in range(50)), ("b.jpg", GOOD), ("b.cls", b"3")]
    with little_memory():
        found, _ = read(write_tar(tmp_path / "x.tar", members))
    assert [(one.key, one.problem, one.label) for one in found][-1] == ("b", "", 3)


DAMAGE: dict[str, Callable[[], bytes]] = {
    "cut: a terabyte is claimed": lambda: header("big.jpg", TERABYTE),
    "cut: 8 exabytes in base 256": lambda: raw_size(header("big.jpg", 0), b"\x80\0\0\0" + b"\x7f" + b"\xff" * 7),
    "a size below zero": lambda: raw_size(header("big.jpg", 0), b"\xff" * 11 + b"\x01"),
    "a size below zero in PAX": lambda: pax("big.jpg", {"size": "-512"}),
    "a size that is none in PAX": lambda: pax("big.jpg", {"size": "9" * 5000}),
    "a size of nonsense": lambda: raw_size(header("big.jpg", 0), b"zzzzzzzzzzzz"),
    "a long name of a gigabyte": lambda: header("././@LongLink", 1 << 30, tarfile.GNUTYPE_LONGNAME),
    "a long link of an exabyte": lambda: header("././@LongLink", 1 << 60, tarfile.GNUTYPE_LONGLINK),
    "a PAX header of a gigabyte": lambda: header("pax", 1 << 30, tarfile.XHDTYPE),
    "a global header of a gigabyte": lambda: header("pax", 1 << 30, tarfile.XGLTYPE),
    "long names without end": lambda: (
        header("././@LongLink", 512, tarfile.GNUTYPE_LONGNAME) + b"n" * 512) * (4 * MOST_HEADER_BYTES // 1024),
    "a sparse map without end": lambda: sparse_endless(),
    "a sparse map that is cut": lambda: pax(
        "big.jpg", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5"}, b"9" * 512),
    "a sparse map of nonsense": lambda: pax(
        "big.jpg", {"GNU.sparse.size": "-5", "GNU.sparse.map": "x,y"}),
}  # fmt: skip


def sparse_endless() -> bytes:
    block = bytearray(sparse_gnu("big.jpg", 1000)[:512])
    block[482] = 1
    more = bytearray(512)
    for at in range(0, 504, 12):
        more[at : at + 12] = tarfile.itn(1, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    more[504] = 1
    return raw_size(bytes(block), bytes(block[124:136])) + bytes(more) * (4 * MOST_HEADER_BYTES // 512)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_header_that_asks_for_too_much_is_damage(tmp_path: Path, kind: str, packed: bool) -> None:
    path = tar_with(tmp_path / "x.tar", DAMAGE[kind](), before=2)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    with little_memory():
        found, problem = read(path)
    assert problem.startswith("damaged shard: "), (found, problem)
    assert [one.data for one in found] in ([GOOD], [GOOD, GOOD])


def read_all_in_little_space(folder: Path) -> None:
    """Read every odd tar in a process that can have 256 MiB more than it has, whoever asks for them."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20),) * 2)
    with pytest.raises(MemoryError):
        bytearray(300 << 20)
    for kind, odd in (LARGE | DAMAGE).items():
        path = tar_with(folder / "x.tar", odd(), before=2)
        for packed in (False, True):
            if packed:
                path.write_bytes(gzip.compress(path.read_bytes()))
            found, problem = read(path)
            assert found[0].data == GOOD, kind
            assert problem.startswith("damaged shard") == (kind in DAMAGE), kind


def test_no_tar_takes_more_memory_than_a_photo_may(tmp_path: Path) -> None:
    """Also of what Python does not count: the limit is the system's."""
    job = forked.start(read_all_in_little_space, tmp_path)
    job.join()
    assert job.exitcode == 0


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress,
                                  lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
                                  lambda data: gzip.compress(data[:3000]) + gzip.compress(data[3000:]),
                                  lambda data: lzma.compress(data[:3000]) + lzma.compress(data[3000:])])  # fmt: skip
def test_a_compressed_tar_is_read_like_a_plain_one_and_a_cut_one_is_damage(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", encoded(photo(i))) for i in range(6)])
    plain, _ = read(path)
    data = pack(path.read_bytes())
    path.write_bytes(data)
    assert read(path) == (plain, "")
    for length in (len(data) // 2, len(data) - 9):
        path.write_bytes(data[:length])
        found, problem = read(path)
        assert "damaged shard" in problem
        assert found == plain[: len(found)]
    path.write_bytes(data[: len(data) // 2] + bytes(20) + data[len(data) // 2 + 20 :])
    assert "damaged shard" in read(path)[1]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_bomb_is_damage_and_its_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    """A member of 200 MB of zeros in a file of some KB: here with bounds a hundredth of the real ones."""
    monkeypatch.setattr(tar_stream, "FREE_EXPANSION", 4 << 20)
    monkeypatch.setattr(tars, "MOST_PHOTO_BYTES", 1 << 20)
    monkeypatch.setattr(tars, "MOST_SAMPLE_BYTES", 2 << 20)
    path = tar_with(tmp_path / "x.tar", header("big.jpg", 64 << 20) + b"\0" * (64 << 20))
    path.write_bytes(pack(path.read_bytes()))
    with little_memory(24 << 20):
        found, problem = read(path)
    assert "expand to" in problem
    assert [one.key for one in found] == ["a0"]


def test_a_xz_dictionary_asks_for_no_more_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", GOOD)])
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26}]
    path.write_bytes(lzma.compress(path.read_bytes(), filters=filters))
    assert read(path)[1] == ""
    monkeypatch.setattr(tar_stream, "XZ_MEMORY", 1 << 20)
    assert "damaged shard" in read(path)[1]


def test_many_empty_members_take_little_memory(tmp_path: Path) -> None:
    """tarfile keeps every header; a million of them would take more than a gigabyte."""
    path = tmp_path / "x.tar"
    empty = header("x.txt", 0)
    path.write_bytes(b"".join(header(f"{i}.txt", 0) for i in range(3000)) + empty * 500 + header("a.jpg", len(GOOD))
                     + GOOD + b"\0" * (-len(GOOD) % 512 + 10240))  # fmt: skip
    with little_memory(6 << 20):
        found, _ = read(path)
    assert [one.data for one in found if not one.problem] == [GOOD]


def test_hard_links_do_not_multiply_the_work_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MOST_AGAIN", 3 * len(GOOD))
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        add(tar, "a.jpg", GOOD)
        for number in range(5):
            info = tarfile.TarInfo(f"b{number}.jpg")
            info.type, info.linkname = tarfile.LNKTYPE, "a.jpg"
            tar.addfile(info)
    (tmp_path / "x.tar").write_bytes(whole.getvalue())
    found, problem = read(tmp_path / "x.tar")
    assert (problem, [one.data for one in found]) == ("", [GOOD] * 4 + [b""] * 2)
    assert "too many" in found[-1].problem


def test_a_disk_that_fails_within_a_tar_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 1024:
                raise OSError(5, "Input/output error")
            return super().read(size)

    tar = write_tar(tmp_path / "x.tar", [("a.jpg", GOOD), ("b.jpg", np.random.default_rng(0).bytes(50_000))])
    for data in (tar.read_bytes(), gzip.compress(tar.read_bytes())):
        tar.write_bytes(data)
        monkeypatch.setattr(LocalFile, "open", lambda self, data=data: Failing(data))
        with pytest.raises(StorageError, match=r"cannot be read: .*Input/output error"):
            read(tar)


def test_pipes_sockets_and_devices_in_a_folder_are_not_opened(tmp_path: Path) -> None:
    """Opening a pipe that nobody writes to waits for ever."""
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "good.jpg").write_bytes(GOOD)
    os.mkfifo(folder / "a" / "pipe.jpg")
    (folder / "a" / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder / "a")
        try:
            server.bind("socket.jpg")
        finally:
            os.chdir(here)
    summary = extract(tiny_config(folder, tmp_path / "c", None, views_only=True))
    assert (summary.photos, summary.skipped) == (1, [])
    # and what has become one since the folder was listed
    shard = open_source(str(folder)).shards[0]
    (folder / "a" / "good.jpg").unlink()
    os.mkfifo(folder / "a" / "good.jpg")
    (one,) = shard.photos()
    assert "not a regular file" in one.problem
    for path in (folder / "a" / "pipe.jpg", Path("/dev/zero"), folder):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(path, 10)


def test_a_file_of_a_terabyte_is_a_broken_photo(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(GOOD)
    for name, size in (("b.jpg", TERABYTE), ("c.jpg", MOST_PHOTO_BYTES + 1)):
        with (folder / name).open("wb") as stream:
            stream.truncate(size)
    with little_memory():
        found = {one.key: one for shard in open_source(str(folder)).shards for one in shard.photos()}
    assert [bool(found[name].problem) for name in ("a.jpg", "b.jpg", "c.jpg")] == [False, True, True]
    assert "too many" in found["b.jpg"].problem


def test_the_photos_of_a_group_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_views, "MOST_GROUP_BYTES", 3 * len(GOOD))
    write_tar(tmp_path / "in" / "x.tar", [(f"{i}.jpg", GOOD) for i in range(8)])
    config = tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, group_size=4, on_error="skip")
    summary = extract(config)
    assert (summary.photos, len(summary.skipped)) == (6, 2)
    assert "give a smaller --group-size" in summary.skipped[0][2]


def test_bounds_leave_room_for_what_is_real() -> None:
    assert MOST_PHOTO_BYTES > 6 * 89_478_485
    assert photos.MOST_PHOTO_BYTES == tars.MOST_PHOTO_BYTES
    rng = np.random.default_rng(0)
    for size in (1, 8, 32, 224):
        for noise in (rng.integers(0, 256, (size, size, 3)), rng.integers(0, 2, (size, size, 3)) * 255):
            crop = encode_crop(noise.astype(np.uint8), JpegSettings(quality=100, subsampling="444"))
            assert len(crop) < most_crop_bytes(size) / 2 or size < 100
            assert len(crop) < most_crop_bytes(size)


SPECS = {
    "a": ArraySpec((12,), "uint8", (1, 0)),
    "b": ArraySpec((3, 5), "float32"),
    "c": ArraySpec((1,), "float16"),
}


def frame_of(num_bytes: int) -> bytes:
    return bytes(Blosc("zstd", 3, Blosc.BITSHUFFLE).encode(np.zeros(num_bytes, np.uint8)))


def claims(frame: bytes, at: int, value: int) -> bytes:
    return frame[:at] + value.to_bytes(4, "little") + frame[at + 4 :]


@pytest.mark.parametrize("at", [4, 8, 12])
@pytest.mark.parametrize("value", [0, 1, 31, 33, 1 << 30, 2**31 - 1, 2**32 - 1])
def test_a_frame_that_claims_anything_else_is_refused_before_it_is_decompressed(
    monkeypatch: pytest.MonkeyPatch, at: int, value: int
) -> None:
    frame = frame_of(32)
    assert unpacked(frame, 32) == bytes(32)
    monkeypatch.setattr(blosc, "decompress", lambda data: pytest.fail("it was decompressed"))
    if at == 8 and 0 < value <= 32:
        return  # pieces of another size are Blosc's to find out
    with pytest.raises(ValueError, match="Blosc frame"):
        unpacked(claims(frame, at, value), 32)


def test_a_frame_of_a_gigabyte_is_refused() -> None:
    """Well made: 4 KB that do decompress to a gigabyte."""
    frame = frame_of(64 << 20)
    assert len(frame) < 100_000
    for spec in SPECS.values():
        with little_memory(1 << 20), pytest.raises(ValueError, match="Blosc frame"):
            read_block(frame + b"crc.", spec)
        with little_memory(1 << 20), pytest.raises(ValueError, match="Blosc frame"):
            read_members([MAGIC + b"crc." + frame + b"crc."], {"x": spec})


@given(st.binary(max_size=60), st.integers(0, 59), st.integers(0, 255))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_no_bytes_crash_the_decoders(data: bytes, at: int, value: int) -> None:
    whole = write_member({"a": np.arange(12, dtype=np.uint8)}, {"a": SPECS["a"]}, 7)
    changed = bytearray(whole)
    changed[at % len(whole)] = value
    for member in (data, bytes(changed), whole[:at], whole + data):
        try:
            read_members([member], {"a": SPECS["a"]})
        except ValueError:
            continue
    for block in (data, bytes(changed)):
        with pytest.raises(ValueError, match="Blosc"):
            read_block(block, SPECS["b"])


def test_the_largest_frames_are_what_incompressible_rows_take(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for spec in SPECS.values():
        noise = rng.integers(0, 256, (32, block_bytes(spec) // 32), dtype=np.uint8)
        values = np.frombuffer(noise.tobytes(), spec.dtype).reshape(32, *spec.shape)
        blocks = write_zip(tmp_path / "x.zip", {"x": values}, {"x": spec})
        assert blocks["x"][0][1] <= most_chunk_bytes(spec)
        member = write_member({"x": values[0]}, {"x": spec}, 0)
        assert len(member) <= most_member_bytes({"x": spec})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("small")
    extract(tiny_config(write_shards(folder / "photos", [5]), folder / "cache", tiny_base, quality="default", views=1))
    return folder / "cache"


def resealed(path: Path, **changes: Any) -> None:
    reseal(path, unsealed(path) | changes)


@pytest.mark.parametrize("size", [10**6, 10**12, 2**53])
def test_a_crop_or_block_that_claims_too_many_bytes_is_refused(small: Path, tmp_path: Path, size: int) -> None:
    """The record is sealed, and agrees with the payload that it names: a sparse file of that size."""
    cache = shutil.copytree(small, tmp_path / "cache")
    views = unsealed(cache / layout.views_record(UNIT))
    coded = unsealed(cache / layout.target_record("tiny", UNIT))
    name, first = next(iter(coded["blocks"].items()))
    last = sorted(b[0] for blocks in coded["blocks"].values() for b in blocks)[-1]
    blocks = {n: [[*b] for b in bs] for n, bs in coded["blocks"].items()}
    blocks[name][0] = [last + 10_000, size, first[0][2]]
    resealed(
        cache / layout.views_record(UNIT),
        sizes=[*views["sizes"][:-1], size],
        payload=views["payload"] | {"size": 2 * size + 10**6},
    )
    opened = open_cache(cache)
    with little_memory():
        record = None
        try:
            record = opened.views_record(UNIT)
        except CacheError:
            assert size >= 2**53, "a schema that bounds sizes may refuse it before"
        if record is not None:
            with pytest.raises(CacheError, match="asks for"):
                opened.read_crops(record, range(len(record.keys)))
    shutil.copy(small / layout.views_record(UNIT), cache / layout.views_record(UNIT))
    resealed(
        cache / layout.target_record("tiny", UNIT),
        blocks=blocks,
        payload=coded["payload"] | {"size": 2 * size + 10**6},
    )
    opened = open_cache(cache)
    with little_memory():
        try:
            target_record = opened["tiny"].record(UNIT)
        except CacheError:
            return
        with pytest.raises(CacheError, match="asks for"):
            opened["tiny"].read_block(target_record, 0)


def test_a_range_beyond_a_file_comes_back_short_without_memory_for_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    with little_memory(1 << 20):
        assert read_local(tmp_path / "x", [(0, TERABYTE), (8, 1 << 50), (10**15, 5)]) == [b"0123456789", b"89", b""]


def test_a_document_of_gigabytes_is_not_read(small: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small, tmp_path / "cache")
    for name in (layout.views_record(UNIT), layout.codec_record("tiny"), layout.MANIFEST):
        with (cache / name).open("r+b") as stream:
            stream.truncate(MOST_WHOLE + 1)
        with little_memory(), pytest.raises(OSError, match="too many"):
            open_store(cache).read(name)
        (what,) = (f.what for f in verify(str(cache)).findings if f.level == "damage" and f.where == name)
        assert f"{MOST_WHOLE + 1:,} bytes are too many, at most {MOST_WHOLE:,} are read" in what


READERS: dict[str, Callable[[Path], Any]] = {
    "cache.json": lambda file: open_cache(file.parent),
    "run.json": lambda file: load_settings(file.parent),
    "config.json": lambda file: describe_export(file.parent),
    "preprocessor_config.json": read_json,
}


@pytest.mark.parametrize("name", READERS)
def test_a_document_that_is_too_large_is_named_with_its_size_and_the_bound(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(TERABYTE)
    with little_memory(), pytest.raises(TecCacheError) as error:
        READERS[name](tmp_path / name)
    most = MOST_WHOLE if name == "cache.json" else MOST_BYTES
    assert all(word in str(error.value) for word in (str(tmp_path / name), f"{TERABYTE:,} bytes", f"{most:,} are read"))
    kind = {"cache.json": Kind.CACHE, "run.json": Kind.RUN}.get(name, Kind.OTHER)
    assert what_is(str(tmp_path)) is kind


def test_pipes_in_a_cache_are_damage_and_nobody_waits(small: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small, tmp_path / "cache")
    payload = open_cache(cache).views_record(UNIT).payload
    assert payload is not None
    for name in (layout.views_record(UNIT), payload.name):
        (cache / name).unlink()
        os.mkfifo(cache / name)
        assert not verify(str(cache), full=True).clean
        with pytest.raises((CacheError, OSError)):
            open_store(cache).read(name)
        (cache / name).unlink()
        shutil.copy(small / name, cache / name)
    os.mkfifo(cache / "records" / "pipe")
    os.mkfifo(cache / ".lock2")
    assert verify(str(cache), full=True).clean


def crop_of(width: int, height: int) -> bytes:
    """A JPEG that claims to be so large."""
    data = bytearray(encoded(photo(0, 32, 32)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize(("width", "height"), [(65_500, 65_500), (MOST_SIDE + 1, 8), (8, MOST_SIDE + 1)])
def test_a_crop_that_claims_to_be_huge_is_refused(width: int, height: int) -> None:
    with little_memory(1 << 20), pytest.raises(ValueError, match="pixels per side"):
        decode_crop(crop_of(width, height))
    with little_memory(1 << 20), pytest.raises(ValueError, match=r"reshape|place|too small"):
        decode_crop(crop_of(width, height), np.zeros((32, 32, 3), np.uint8))


def views_of(names: list[str], payload_size: int) -> ViewsRecord:
    zeros: list[int] = [0] * len(names)
    return ViewsRecord(unit=str(UNIT), identity="0" * 64, photos_sha256="0" * 64, keys=names, keys_sha256="0" * 64,
                       labels=[None] * len(names), offsets=zeros, sizes=zeros, crc32=zeros,
                       payload=Payload("x", payload_size, "0" * 64), skipped=[], notes=[])  # fmt: skip


TARS: dict[str, Callable[[], bytes]] = {
    "many members": lambda: header("x.jpg", 0) * 20_000,
    "a label of a terabyte": lambda: header("x.cls", TERABYTE),
    "a label of a kilobyte": lambda: header("x.cls", 1024) + b"1" * 1024,
    "a sparse label": lambda: sparse_gnu("x.cls", TERABYTE),
    "a sparse map without end": sparse_endless,
    "a long name of a gigabyte": lambda: header("x", 1 << 30, tarfile.GNUTYPE_LONGNAME),
    "a PAX header of a gigabyte": lambda: header("x", 1 << 30, tarfile.XHDTYPE),
    "long names without end": lambda: (header("x", 512, tarfile.GNUTYPE_LONGNAME) + b"n" * 512) * 4000,
    "a size below zero": lambda: raw_size(header("x.jpg", 0), b"\xff" * 11 + b"\x01"),
    "a pipe": lambda: header("x.jpg", 0, tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", TARS)
def test_the_audit_of_a_tar_takes_little_memory(kind: str) -> None:
    data = TARS[kind]() + b"\0" * 10240
    with little_memory(16 << 20):
        assert sensible(lambda: tar_problem(io.BytesIO(data), views_of(["a"], len(data)), UNIT))


def zip_with(files: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return whole.getvalue()


def target_of(blocks: dict[str, list[list[int]]]) -> TargetRecord:
    return TargetRecord(unit=str(UNIT), identity="0" * 64, codec_sha256="", count=1, keys_sha256="0" * 64,
                        views_sha256="", payload=None, blocks=blocks)  # fmt: skip


ZIPS: dict[str, Callable[[], bytes]] = {
    "metadata that is a bomb": lambda: zip_with({"a/zarr.json": b" " * (64 << 20) + b"{}"}, zipfile.ZIP_DEFLATED),
    "metadata of megabytes": lambda: zip_with({"a/zarr.json": b" " * (2 << 20) + b"{}"}),
    "deep metadata": lambda: zip_with({"a/zarr.json": b"[" * 100_000}),
    "metadata of nonsense": lambda: zip_with({"a/zarr.json": b'{"shape": 5}'}),
    "many files": lambda: zip_with({f"{i}": b"" for i in range(3000)} | {"a/zarr.json": b"{}"}),
    "a comment": lambda: zip_with({"a/zarr.json": b"{}"})[:-2] + b"\x05\0abcde",
    "nothing": lambda: b"",
    "cut": lambda: zip_with({"a/zarr.json": b"{}"})[:40],
}


@pytest.mark.parametrize("kind", ZIPS)
def test_the_audit_of_a_zip_takes_little_memory(kind: str) -> None:
    data = ZIPS[kind]()
    with little_memory(16 << 20):
        assert sensible(lambda: zip_problem(io.BytesIO(data), target_of({"a": [[0, 1, 0]]}), {"a": SPECS["a"]}))


def test_a_zip_of_more_files_than_its_format_counts_is_read(tmp_path: Path) -> None:
    """More than 65,535 files have a list of another kind, whose size is found as well."""
    from tec_cache.audit.payloads import _directory_bytes

    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a", b"x")
        archive.filelist = archive.filelist * 70_000
        archive._didModify = True  # type: ignore[attr-defined]
    assert _directory_bytes(whole) == 70_000 * 47


def test_parameters_of_a_codec_are_bounded_by_the_targets(small: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small, tmp_path / "cache")
    target = open_cache(cache)["tiny"]
    payload = target.codec_record.payload
    assert payload is not None
    assert payload.size < most_parameter_bytes(target.spec)
    resealed(
        cache / layout.codec_record("tiny"), payload=vars(payload) | {"size": most_parameter_bytes(target.spec) + 1}
    )
    with pytest.raises(CacheError, match="asks for"):
        _ = open_cache(cache)["tiny"].codec


@pytest.mark.parametrize("grid", [2, 10**6, 10**9])
def test_parameters_that_claim_another_grid_allocate_nothing_for_it(small: Path, grid: int) -> None:
    target = open_cache(small)["tiny"]
    payload = target.codec_record.payload
    assert payload is not None
    data = target.cache.store.read(payload.name)
    length = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["codec"])
    about["spec"]["grid"] = grid
    tensors = {"frequencies": torch.zeros(3, dtype=torch.int32)}
    from safetensors.torch import load

    changed = save(load(data) | tensors, {"codec": json.dumps(about)})
    with little_memory(8 << 20), pytest.raises(CacheError, match="parameters are damaged"):
        get_codec({"name": "transform"}, changed)


@pytest.mark.parametrize("header_bytes", [0, 5, 2**40, 2**63])
def test_parameters_with_a_header_of_any_length_are_damage(header_bytes: int) -> None:
    for data in (header_bytes.to_bytes(8, "little") + b"{}" * 10, header_bytes.to_bytes(8, "little")):
        with little_memory(8 << 20), pytest.raises(CacheError, match="parameters are damaged"):
            get_codec({"name": "transform"}, data)


def test_codes_in_a_pack_that_claim_a_gigabyte_are_damage(small: Path, tmp_path: Path) -> None:
    """Everything is sealed anew: the member's CRC, the tar's SHA-256, the record."""
    from pipelines.pack import pack
    from tec_cache.store.files import hash_file

    pack(str(small), str(tmp_path / "pack"))
    path = tmp_path / "pack" / layout.pack_record(UNIT)
    body = unsealed(path)
    tar = tmp_path / "pack" / body["payload"]["name"]
    codes = body["targets"]["tiny"]
    data = bytearray(tar.read_bytes())
    at, size = codes["offsets"][0], codes["sizes"][0]
    data[at + 12 : at + 16] = (2**31 - 17).to_bytes(4, "little")
    codes["crc32"][0] = zlib.crc32(data[at : at + size])
    tar.write_bytes(data)
    sha256 = hash_file(tar)
    body["payload"] |= {"sha256": sha256, "name": layout.pack_payload(UNIT, sha256)}
    tar.rename(tmp_path / "pack" / body["payload"]["name"])
    reseal(path, body)
    with little_memory(), pytest.raises(CacheError, match="Blosc frame"):
        unpack(str(tmp_path / "pack"), str(tmp_path / "out"))
