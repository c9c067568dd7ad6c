"""Names that are not UTF-8, or hold control characters: those very files are read and written, and nothing crashes."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from pipelines.export import export
from pipelines.extract import extract
from pipelines.info import info
from pipelines.merge import merge
from pipelines.pack import pack
from pipelines.terminal.info_texts import text_of
from pipelines.train import train
from pipelines.unpack import unpack
from pipelines.verify import verify
from tec_cache.base.load import load_base
from tec_cache.cache.opening import open_cache
from tec_cache.config import TrainConfig
from tec_cache.paths import encodable, exact_name
from tec_cache.printable import printable
from tests.conftest import encoded, photo, tiny_config, tiny_training, write_tiny_base

NAMES = [b"caf\xe9", b"\xff\x1b[2J\n  to do: x", "写真 é".encode()]
IDS = ["latin-1", "control", "utf-8"]


@pytest.fixture(params=NAMES, ids=IDS)
def name(request: pytest.FixtureRequest) -> str:
    return os.fsdecode(request.param)


def tar_of(path: Path, name: str, numbers: range) -> None:
    """Write a tar whose members have a name like this."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", errors="surrogateescape") as tar:
        for number in numbers:
            data = encoded(photo(number))
            member = tarfile.TarInfo(f"{name.splitlines()[0]}{number}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_tars_caches_packs_runs_and_exports(name: str, tiny_base: Path, tmp_path: Path) -> None:
    base, home = tmp_path / name / "base", tmp_path / name
    shutil.copytree(tiny_base, base)
    for shard in range(2):
        tar_of(home / "photos" / f"{name}{shard}.tar", name, range(8 * shard, 8 * shard + 8))
    cache = home / f"c{name}"
    assert extract(tiny_config(home / "photos", cache, base, views=1, name="t")).photos == 16
    assert verify(str(cache), full=True, base=True, sample=8, device="cpu").clean, "its base is found again"
    again = extract(tiny_config(None, cache, None, name="t"))
    assert (again.targets_made, again.missing) == (0, 0)

    pack(str(cache), str(home / f"p{name}"))
    unpack(str(home / f"p{name}"), str(home / f"u{name}"))
    merge(str(home / f"m{name}"), [str(cache)])
    for made in ("u", "m"):
        assert files_below(home / f"{made}{name}") == files_below(cache)

    run = home / f"r{name}"
    config = tiny_training(cache, run, epochs=2, batch_size=8, stage=str(home / f"s{name}"), log_every=1)
    assert isinstance(config, TrainConfig)
    assert train(config).finished
    assert list((run / "tensorboard").iterdir()), "in that very folder"
    out = export(run, home / f"e{name}")
    assert load_base(str(out), grid=4, k=None).identity["weights_sha256"] == info(str(out))["weights_sha256"]
    for place in (cache, home / f"p{name}", run, out):
        found = info(str(place))
        json.loads(json.dumps(found))
        assert all(printable(line) == line for line in text_of(found).split("\n"))
        assert printable(str(place)) in text_of(found)


def test_folders_of_photos(name: str, tiny_base: Path, tmp_path: Path) -> None:
    for number in range(6):
        folder = tmp_path / name / f"{name}{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}{number}.jpg").write_bytes(encoded(photo(number)))
    (folder / f"{name} broken.jpg").write_bytes(b"x")
    summary = extract(tiny_config(tmp_path / name, tmp_path / "c", tiny_base, views=1, on_error="skip"))
    assert (summary.photos, len(summary.skipped)) == (6, 1)
    cache = open_cache(tmp_path / "c")
    labels = [label for unit in cache.view_units for label in cache.views_record(unit).labels]
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]


def test_the_name_of_a_base_comes_back(name: str, tmp_path: Path) -> None:
    from tec_cache.data.photos import plain_text

    assert exact_name(plain_text(name)) == name


def test_a_library_that_takes_utf_8_only_gets_a_name_of_the_same_file(name: str, tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / name)
    with encodable(folder / "config.json") as place:
        place.encode()
        assert Path(place).read_bytes() == (folder / "config.json").read_bytes()
    if place != str(folder / "config.json"):
        assert not Path(place).exists(), "the link is gone"
