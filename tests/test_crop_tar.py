"""The tar of crops: byte for byte what WebDataset's own writer makes, with next to no use of tarfile."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from tec_cache.cache import crop_tar
from tec_cache.cache.crop_tar import write_tar

NAMES = [
    "a", "x" * 99, "x" * 100, "x" * 101, "d/" * 40 + "x" * 19, "d/" * 40 + "x" * 20, "d/" * 40 + "x" * 21,
    "y" * 155 + "/" + "x" * 99, "ü", "x" * 99 + "ü", "照片/一", "a b", "..", "z" * 3000,
]  # fmt: skip
SIZES = [0, 1, 511, 512, 513, 10_239, 10_240, 70_000]


def by_webdataset(path: Path, files: list[tuple[str, bytes]]) -> list[int]:
    """Write files, each as a sample of its own; read the positions back."""
    with path.open("wb") as stream, wds.TarWriter(stream, user="", group="", mtime=0, encoder=False) as tar:
        for name, data in files:
            tar.write({"__key__": name.removesuffix(".jpg"), "jpg": data})
    with tarfile.open(path) as tar:
        return [info.offset_data for info in tar]


@pytest.mark.parametrize(
    "files",
    [
        [],
        *([(f"{name}.jpg", bytes(size))] for name in NAMES for size in (0, 700)),
        [(f"{number}.jpg", b"\xff" * size) for number, size in enumerate(SIZES)],
        [(f"{name}.jpg", name.encode()) for name in NAMES],
    ],
)
def test_the_bytes_are_those_of_webdatasets_writer(tmp_path: Path, files: list[tuple[str, bytes]]) -> None:
    positions = write_tar(tmp_path / "ours", files)
    assert positions == by_webdataset(tmp_path / "theirs", files)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@given(
    name=st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=120), size=st.integers(0, 1 << 34)
)
def test_every_header_is_tarfiles(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    assert crop_tar.header(name, size) == info.tobuf()


def test_no_header_of_a_plain_name_is_made_by_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crop_tar.header("a.jpg", 1)  # the block from which all others are made
    made: list[str] = []
    inner = tarfile.TarInfo

    def counted(name: str = "") -> tarfile.TarInfo:
        made.append(name)
        return inner(name)

    monkeypatch.setattr(tarfile, "TarInfo", counted)
    write_tar(tmp_path / "tar", [(f"{number:08d}.jpg", b"x") for number in range(100)] + [("ü.jpg", b"x")])
    assert made == ["ü.jpg"]
