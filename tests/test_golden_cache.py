"""The format on disk: caches that were made once are read by every later program, and by others' readers.

What is read here with tensorstore is the same in both versions; `test_format_reader.py` reads version 3 from its
document alone.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import tensorstore as ts
from numcodecs import blosc
from safetensors.numpy import load

from pipelines.info import info
from pipelines.train import train
from pipelines.unpack import unpack
from tec_cache.cache.opening import open_cache
from tests.conftest import files_below, tiny_training
from tests.make_golden_cache import ROWS, expected

DATA = Path(__file__).parent / "data"
VERSIONS = [1, 3]
UNITS = ["000000.000-v00", "000000.000-v01"]


def in_folder(version: int, unit: str) -> str:
    """Return where in a folder the files of a unit are: version 1 has no folder of a source shard."""
    return unit if version == 1 else f"{unit[:6]}/{unit}"


def golden(version: int) -> Path:
    return DATA / f"golden_cache_v{version}"


def stored(version: int) -> dict[str, np.ndarray]:
    with np.load(golden(version) / "expected.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("version", VERSIONS)
def test_this_program_decodes_it_as_the_one_that_made_it(version: int) -> None:
    now, then = expected(golden(version) / "cache"), stored(version)
    assert set(now) == set(then)
    for name, values in then.items():
        np.testing.assert_allclose(now[name], values, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_file_is_what_its_record_says_and_training_reads_it(version: int, tmp_path: Path) -> None:
    from pipelines.verify import verify

    cache = Path(shutil.copytree(golden(version) / "cache", tmp_path / "cache"))
    assert not verify(str(cache), full=True).findings
    assert info(str(cache))["format"] == version
    summary = train(tiny_training(cache, tmp_path / "run", target="coded", epochs=2, batch_size=16))
    assert summary.finished


def test_a_pack_of_version_3_is_the_same_cache(tmp_path: Path) -> None:
    back, original = tmp_path / "back", files_below(golden(3) / "cache")
    unpack(str(golden(3) / "pack"), str(back))
    assert open_cache(golden(3) / "pack").num_views == 1
    there = {name: data for name, data in files_below(back).items() if name != ".lock"}
    # another release of Zarr or zstd gives the same values in other bytes
    same = {name for name in there if name.endswith((".tar", "cache.json", "target.json")) or "records/source" in name}
    assert {name: there[name] for name in same} == {name: original[name] for name in same}
    assert set(there) >= {name for name in original if name.startswith(("records/source", "records/content"))}
    before, after = stored(3), expected(back)
    for name, values in after.items():
        np.testing.assert_allclose(values, before[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["exact", "coded"])
@pytest.mark.parametrize("unit", UNITS)
def test_tensorstore_and_numpy_alone_rebuild_the_targets(version: int, name: str, unit: str) -> None:
    root, then = golden(version) / "cache", stored(version)
    record = body(root / f"records/targets/{name}/{in_folder(version, unit)}.json")
    arrays = {array: with_tensorstore(root / record["payload"]["name"], array) for array in record["blocks"]}
    spec = body(root / f"targets/{name}/target.json")["identity"]["spec"]
    assert (spec["grid"], spec["columns"], record["count"]) == (4, None, 40)
    if name == "exact":
        features, attention = arrays["features"][ROWS].astype(float), arrays["attention"][ROWS].astype(float)
    else:
        features, attention = transformed(root / f"targets/{name}", arrays, spec)
    np.testing.assert_allclose(features, then[f"{name}/{unit}/features"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(attention, then[f"{name}/{unit}/attention"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(arrays["rows"][ROWS], then[f"{name}/{unit}/rows"])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_block_is_one_range_of_the_zip(version: int) -> None:
    """Read as the documentation says for those without a Zarr reader."""
    root = golden(version) / "cache"
    record = body(root / f"records/targets/coded/{in_folder(version, UNITS[1])}.json")
    data = (root / record["payload"]["name"]).read_bytes()
    whole = with_tensorstore(root / record["payload"]["name"], "features")
    for number, (position, size, crc) in enumerate(record["blocks"]["features"]):
        chunk = data[position : position + size]
        assert zlib.crc32(chunk) == crc
        rows = np.frombuffer(blosc.decompress(chunk[:-4]), np.uint8).reshape(-1, 32).T
        np.testing.assert_array_equal(rows[: 40 - 32 * number], whole[32 * number : 32 * number + 32])


def body(path: Path) -> dict:
    return json.loads(path.read_text())["body"]


def with_tensorstore(path: Path, array: str) -> np.ndarray:
    kvstore = {"driver": "zip", "base": f"file://{path}", "path": f"{array}/"}
    return np.asarray(ts.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result())


def transformed(folder: Path, arrays: dict[str, np.ndarray], spec: dict) -> tuple[np.ndarray, np.ndarray]:
    """Decode the transform codec's arrays."""
    data = (folder.parent.parent / body(folder / "codec.json")["payload"]["name"]).read_bytes()
    about = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["codec"])
    tensors = load(data)
    grid, heads, rows = spec["grid"], spec["num_heads"], spec["k"] + 1
    found = []
    for place, (name, width) in enumerate((("features", spec["channels"]), ("attention", heads * rows))):
        low, step, wide = (about[name][field] for field in ("low", "step", "wide"))
        mean, basis, scan = (tensors[f"{name}.{part}"] for part in ("mean", "basis", "scan"))
        values = []
        for c, gain in zip(arrays[name][ROWS], arrays["gain"][ROWS], strict=True):
            high, low_bytes = c[:wide].astype(int), c[wide:].astype(int)
            low_bytes[:wide] += 256 * high
            levels = np.where(low_bytes % 2 == 0, low_bytes // 2, -(low_bytes + 1) // 2)
            y = np.zeros(grid * grid * width)
            y[scan] = levels * step * gain[place]
            y = y.reshape(grid * grid, width)
            y[:low], y[low:] = y[:low] @ basis[0], y[low:] @ basis[1]
            spectrum = np.zeros_like(y)
            spectrum[tensors["frequencies"]] = y
            plane = scipy.fft.idctn(spectrum.reshape(grid, grid, width), axes=(0, 1), norm="ortho")
            values.append(plane.reshape(grid * grid, width) + mean)
        found.append(np.stack(values))
    features, attention = found
    return features, attention.transpose(0, 2, 1).reshape(len(ROWS), heads, rows, grid * grid)
