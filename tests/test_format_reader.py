"""An independent reader of version 3: made from docs/cache-format.md, with nothing of this project but the fixture."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc

GOLDEN = Path(__file__).parent / "data" / "golden_cache_v3"
ROWS = [0, 7, 31, 32, 39]
DOCUMENT = (Path(__file__).parent.parent / "docs" / "cache-format.md").read_text()


KINDS = {
    r"cache\.json": "cache",
    r"pack\.json": "pack",
    r"targets/\w+/target\.json": "target",
    r"targets/\w+/codec\.json": "codec",
    r"records/content\.json": "content",
    r"records/(asked|source)/\d+\.json": r"\1",
    r"records/(views|packed)/\d+/[^/]+\.json": r"\1",
    r"records/(targets)/\w+/\d+/[^/]+\.json": r"\1",
}
"""Name of a JSON file -> the kind that it says it is."""


def body(root: Path, name: str) -> dict[str, Any]:
    """Check a JSON file by its bytes alone and return its body."""
    data = (root / name).read_bytes()
    (kind,) = (re.sub(pattern, kind, name) for pattern, kind in KINDS.items() if re.fullmatch(pattern, name))
    head = b'{"tec-cache":"' + kind.encode() + b'","format":3,"body":'
    assert data.startswith(head)
    assert data[-78:-67] == b',"sha256":"'
    assert data[-3:] == b'"}\n'
    assert data[-67:-3].decode() == hashlib.sha256(data[:-78]).hexdigest()
    found: dict[str, Any] = json.loads(data[len(head) : -78])
    return found


def folder(unit: str) -> str:
    """Return the folder of a unit's source shard and its name."""
    return f"{unit.partition('.')[0]}/{unit}"


def payload(root: Path, entry: dict[str, Any], name: str) -> bytes:
    """Return a payload's bytes; name: what it must be called, with HASH in the place of the hash."""
    assert entry["name"] == name.replace("HASH", entry["sha256"][:16])
    data = (root / entry["name"]).read_bytes()
    assert len(data) == entry["size"]
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    return data


def hash_strings(strings: list[str]) -> str:
    data = b"".join(len(s.encode()).to_bytes(4, "little") + s.encode() for s in strings)
    return hashlib.sha256(data).hexdigest()


def member_name(key: str, view: int) -> str:
    """Escape a key as the document says."""
    plain = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-~"
    if not (key.startswith("/") or key.endswith("/") or "//" in key):
        plain += b"/"
    return "".join(chr(b) if b in plain else f"%{b:02X}" for b in key.encode()) + f"-v{view:02d}"


class Reader:
    """A complete cache of one source shard."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = body(root, "cache.json")
        self.num_views = len(list((root / "records" / "asked").iterdir()))
        (shard,) = self.manifest["identity"]["source"]["shards"]
        source = root / "records" / "source" / "000000.json"
        self.source = body(root, "records/source/000000.json")
        assert self.source["shard"] == shard["name"]
        content = body(root, "records/content.json")
        assert content["source_sha256"] == [hashlib.sha256(source.read_bytes()).hexdigest()]
        assert content["identity"] == self.manifest["fingerprint"]

    def units(self) -> list[tuple[str, int, int]]:
        """Name the units that have to be there, with group and view."""
        return [(f"000000.{g:03d}-v{v:02d}", g, v) for g in range(self.source["groups"]) for v in range(self.num_views)]

    def views(self, unit: str, group: int) -> dict[str, Any]:
        """Return the record of a unit of views."""
        record = body(self.root, f"records/views/{folder(unit)}.json")
        assert record["unit"] == unit
        assert record["identity"] == self.manifest["fingerprint"]
        assert record["photos_sha256"] == self.source["group_sha256"][group]
        assert record["keys_sha256"] == hash_strings(record["keys"])
        return record

    def crops(self, record: dict[str, Any]) -> list[bytes]:
        """Return the JPEGs of a unit by their positions."""
        data = payload(self.root, record["payload"], f"views/{folder(record['unit'])}.HASH.tar")
        found = [data[o : o + s] for o, s in zip(record["offsets"], record["sizes"], strict=True)]
        assert [zlib.crc32(jpeg) for jpeg in found] == record["crc32"]
        return found

    def codec(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what the parameters of a codec say: the entry `codec`, and the tensors of the safetensors file."""
        entry = body(self.root, f"targets/{name}/codec.json")["payload"]
        if entry is None:
            return {}, {}
        data = payload(self.root, entry, f"targets/{name}/codec.HASH.safetensors")
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        about = json.loads(header.pop("__metadata__")["codec"])
        dtypes = {"F32": np.float32, "I32": np.int32}
        tensors = {}
        for tensor, facts in header.items():
            begin, end = facts["data_offsets"]
            values = np.frombuffer(data[start + begin : start + end], dtypes[facts["dtype"]])
            tensors[tensor] = values.reshape(facts["shape"])
        return about, tensors

    def arrays(self, name: str, unit: str, views: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the stored arrays of a unit of targets, from the blocks."""
        target = body(self.root, f"targets/{name}/target.json")
        record = body(self.root, f"records/targets/{name}/{folder(unit)}.json")
        assert target["identity"]["cache"] == self.manifest["fingerprint"]
        assert record["identity"] == target["fingerprint"]
        assert (record["keys_sha256"], record["views_sha256"]) == (views["keys_sha256"], views["payload"]["sha256"])
        data = payload(self.root, record["payload"], f"targets/{name}/{folder(unit)}.HASH.zip")
        shapes = array_shapes(target["identity"]["spec"], self.codec(name))
        assert set(shapes) == set(record["blocks"])
        found = {}
        for array, (dtype, shape, transposed) in shapes.items():
            blocks = []
            for position, size, crc in record["blocks"][array]:
                block = data[position : position + size]
                assert zlib.crc32(block) == crc
                values = np.frombuffer(blosc.decompress(block[:-4]), dtype)
                blocks.append(values.reshape(*shape, 32).T if transposed else values.reshape(32, *shape))
            found[array] = np.concatenate(blocks)
            assert not found[array][record["count"] :].any(), "the last block is filled up with zeros"
            found[array] = found[array][: record["count"]]
        return found


def array_shapes(spec: dict[str, Any], codec: tuple[dict, dict]) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """Say dtype, shape of a row and whether a block lies with its rows innermost (for rows of one axis)."""
    about, tensors = codec
    length = spec["grid"] * (spec["columns"] or spec["grid"])
    shapes: dict[str, tuple[str, tuple[int, ...], bool]] = {"rows": ("u1", (spec["k"],), False)}
    if not about:
        shapes["features"] = ("<f2", (length, spec["channels"]), False)
        shapes["attention"] = ("<f2", (spec["num_heads"], spec["k"] + 1, length), False)
        return shapes
    for name in ("features", "attention"):
        shapes[name] = ("u1", (about[name]["wide"] + len(tensors[f"{name}.scan"]),), True)
    shapes["gain"] = ("<f4", (2,), True)
    return shapes


def decoded(spec: dict[str, Any], codec: tuple[dict, dict], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn stored arrays into features (rows, L, C) and centred logits (rows, H, R, L)."""
    about, tensors = codec
    if not about:
        return {name: arrays[name].astype(float) for name in ("features", "attention")}
    grid, columns = spec["grid"], spec["columns"] or spec["grid"]
    found = {}
    for place, name in enumerate(("features", "attention")):
        low, step, wide = (about[name][field] for field in ("low", "step", "wide"))
        mean, basis, scan = (tensors[f"{name}.{part}"] for part in ("mean", "basis", "scan"))
        views = []
        for c, gain in zip(arrays[name], arrays["gain"], strict=True):
            high, low_bytes = c[:wide].astype(int), c[wide:].astype(int)
            low_bytes[:wide] += 256 * high
            levels = np.where(low_bytes % 2 == 0, low_bytes // 2, -(low_bytes + 1) // 2)
            y = np.zeros(grid * columns * len(mean))
            y[scan] = levels * step * gain[place]
            y = y.reshape(grid * columns, len(mean))
            y[:low], y[low:] = y[:low] @ basis[0], y[low:] @ basis[1]
            spectrum = np.zeros_like(y)
            spectrum[tensors["frequencies"]] = y
            plane = scipy.fft.idctn(spectrum.reshape(grid, columns, len(mean)), axes=(0, 1), norm="ortho")
            views.append(plane.reshape(grid * columns, len(mean)) + mean)
        found[name] = np.stack(views)
    rows = len(found["attention"])
    logits = found["attention"].transpose(0, 2, 1).reshape(rows, spec["num_heads"], spec["k"] + 1, grid * columns)
    return found | {"attention": logits}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(GOLDEN / "cache")


def test_every_file_is_accounted_for(reader: Reader) -> None:
    """The names that the document gives, and no others."""
    root = reader.root
    known = {"cache.json", "records/content.json", "records/source/000000.json", "index/views.idx"}
    known |= {f"records/asked/{view:02d}.json" for view in range(reader.num_views)}
    for unit, group, _ in reader.units():
        record = reader.views(unit, group)
        known |= {f"records/views/{folder(unit)}.json", record["payload"]["name"]}
        for name in ("exact", "coded"):
            target = f"records/targets/{name}/{folder(unit)}.json"
            known |= {target, body(root, target)["payload"]["name"]}
    for name in ("exact", "coded"):
        known |= {f"targets/{name}/target.json", f"targets/{name}/codec.json", f"index/targets/{name}.idx"}
    known.add(body(root, "targets/coded/codec.json")["payload"]["name"])
    assert {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} == known


def test_crops_and_labels_are_those_of_the_tar(reader: Reader) -> None:
    assert (reader.num_views, reader.source["photos"], len(reader.units())) == (2, 41, 2)
    seen = set()
    for unit, group, view in reader.units():
        record = reader.views(unit, group)
        crops = reader.crops(record)
        assert len(record["keys"]) + len(record["skipped"]) == reader.source["photos"]
        assert (len(crops), len(record["skipped"]), record["notes"]) == (40, 1, [])
        assert all(jpeg.startswith(b"\xff\xd8") for jpeg in crops)
        wanted = []
        for key, label in zip(record["keys"], record["labels"], strict=True):
            name = member_name(key, view)
            # WebDataset sorts nothing: the image and its label in either order, sample by sample
            wanted.append({f"{name}.jpg"} | ({f"{name}.cls"} if label is not None else set()))
        with tarfile.open(reader.root / record["payload"]["name"]) as tar:
            members = tar.getmembers()
            seen |= {bool(member.pax_headers) for member in members}
            labels = {m.name: tar.extractfile(m).read() for m in members if m.name.endswith(".cls")}  # type: ignore[union-attr]
            jpegs = [m.offset_data for m in members if m.name.endswith(".jpg")]
        assert jpegs == record["offsets"]
        assert {m.name for m in members} == set().union(*wanted)
        for key, label in zip(record["keys"], record["labels"], strict=True):
            assert labels.get(f"{member_name(key, view)}.cls") == (None if label is None else str(label).encode())
    assert seen == {True, False}, "some names are longer than a plain header holds"


@pytest.mark.parametrize("name", ["exact", "coded"])
def test_targets_are_those_of_the_program_that_made_them(reader: Reader, name: str) -> None:
    spec = body(reader.root, f"targets/{name}/target.json")["identity"]["spec"]
    with np.load(GOLDEN / "expected.npz") as expected:
        for unit, group, _ in reader.units():
            arrays = reader.arrays(name, unit, reader.views(unit, group))
            chosen = {array: values[ROWS] for array, values in arrays.items()}
            found = decoded(spec, reader.codec(name), chosen) | {"rows": chosen["rows"]}
            for what in ("features", "attention", "rows"):
                np.testing.assert_allclose(found[what], expected[f"{name}/{unit}/{what}"], rtol=0, atol=1e-5)
            np.testing.assert_allclose(found["attention"].mean(-1), 0, atol=2e-3, err_msg="rows lack their mean")
            if name == "exact":
                meaning_of_the_numbers(found)


@pytest.mark.parametrize("name", ["exact", "coded"])
def test_a_zip_says_what_it_is(reader: Reader, name: str) -> None:
    """One that was separated from its cache still names its unit, its set and the crops beside it."""
    target, codec = (body(reader.root, f"targets/{name}/{file}.json") for file in ("target", "codec"))
    for unit, group, _ in reader.units():
        views = reader.views(unit, group)
        record = body(reader.root, f"records/targets/{name}/{folder(unit)}.json")
        with zipfile.ZipFile(reader.root / record["payload"]["name"]) as archive:
            about = json.loads(archive.read("zarr.json"))["attributes"]["tec_cache"]
            dimensions = {a: json.loads(archive.read(f"{a}/zarr.json"))["dimension_names"] for a in record["blocks"]}
        assert about == {
            "format": 3,
            "unit": unit,
            "target_set": target["fingerprint"],
            "codec_sha256": codec["payload"]["sha256"] if codec["payload"] else "",
            "keys_sha256": views["keys_sha256"],
            "views_sha256": views["payload"]["sha256"],
        }
        assert all(names[0] == "view" for names in dimensions.values())
        assert dimensions["rows"] == ["view", "rank"]


ENTRY = np.dtype([("shard", "<u4"), ("group", "<u4"), ("view", "<u4"), ("rows", "<u4"), ("record_bytes", "<u4"),
                  ("details_crc32", "<u4"), ("skipped", "<u4"), ("noted", "<u4"), ("payload_bytes", "<u8"),
                  ("payload_sha256", "V32"), ("views_sha256", "V32")])  # fmt: skip


CROP = np.dtype([("key", "<u8"), ("label", "<i8"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])


def index(root: Path, name: str) -> tuple[np.ndarray, list[bytes], dict[str, Any]]:
    """Check an index and return its table, the details of each unit and its heading."""
    data = (root / name).read_bytes()
    magic, version, each, count, table, heading, size = struct.unpack("<8sIIQQQQ", data[:48])
    assert (magic, version, each, size) == (b"TECINDEX", 1, ENTRY.itemsize, len(data))
    assert data[48:80] == hashlib.sha256(data[:48] + data[table:]).digest()
    entries = np.frombuffer(data[table:heading], ENTRY, count)
    about = json.loads(data[heading:])
    if about["type"] == "views":
        sizes = entries["rows"] * CROP.itemsize
    elif about["packed"]:
        sizes = entries["rows"] * 20
    else:
        sizes = -(-entries["rows"].astype(int) // about["block_rows"]) * len(about["arrays"]) * 20
    ends = 80 + np.cumsum(sizes, dtype=int)
    assert ends[-1] == table
    details = [data[end - length : end] for end, length in zip(ends, sizes, strict=True)]
    assert [zlib.crc32(piece) for piece in details] == entries["details_crc32"].tolist()
    return entries, details, about


def test_the_index_says_what_the_records_say(reader: Reader) -> None:
    root = reader.root
    entries, details, about = index(root, "index/views.idx")
    assert (about["identity"], about["packed"], about["num_views"]) == (reader.manifest["fingerprint"], False, 2)
    assert about["groups"] == [reader.source["groups"]]
    assert about["content_sha256"] == hashlib.sha256((root / "records/content.json").read_bytes()).hexdigest()
    for (unit, group, view), entry, piece in zip(reader.units(), entries, details, strict=True):
        record = reader.views(unit, group)
        assert (entry["shard"], entry["group"], entry["view"]) == (0, group, view)
        assert (entry["rows"], entry["skipped"], entry["noted"]) == (len(record["keys"]), len(record["skipped"]), 0)
        assert entry["record_bytes"] == (root / f"records/views/{folder(unit)}.json").stat().st_size
        check_payload(entry, record)
        rows = np.frombuffer(piece, CROP)
        assert rows["offset"].tolist() == record["offsets"]
        assert rows["size"].tolist() == record["sizes"]
        assert rows["crc"].tolist() == record["crc32"]
        assert rows["label"].tolist() == [-1 if label is None else label for label in record["labels"]]
        assert len(set(rows["key"].tolist())) == len(rows)
    for name in ("exact", "coded"):
        entries, details, about = index(root, f"index/targets/{name}.idx")
        for (unit, _, _), entry, piece in zip(reader.units(), entries, details, strict=True):
            record = body(root, f"records/targets/{name}/{folder(unit)}.json")
            check_payload(entry, record)
            assert entry["views_sha256"].tobytes().hex() == record["views_sha256"]
            places = np.frombuffer(piece, [("offset", "<u8"), ("size", "<u8"), ("crc", "<u4")])
            places = places.reshape(-1, len(about["arrays"]))
            for number, array in enumerate(about["arrays"]):
                assert [list(place) for place in places[:, number].tolist()] == record["blocks"][array]


def check_payload(entry: np.void, record: dict[str, Any]) -> None:
    assert entry["payload_bytes"] == record["payload"]["size"]
    assert entry["payload_sha256"].tobytes().hex() == record["payload"]["sha256"]


def meaning_of_the_numbers(found: dict[str, np.ndarray]) -> None:
    """Check the document's definitions on what is stored in half precision."""
    np.testing.assert_allclose(found["features"].mean(1), 0, atol=2e-3)
    np.testing.assert_allclose(found["features"].var(1, ddof=1), 1, atol=5e-3)
    scores = found["attention"][:, :, 0].mean(1)  # of row 0, over the heads; its mean does not change the order
    for view, rows in zip(scores, found["rows"].astype(int), strict=True):
        assert np.all(np.diff(view[rows]) <= 2e-3), "the highest score first"
        assert view[rows].min() >= np.delete(view, rows).max() - 2e-3


def test_the_pack_holds_the_same(reader: Reader) -> None:
    root = GOLDEN / "pack"
    identity = body(root, "pack.json")["identity"]
    assert (identity["cache"], identity["num_views"]) == (reader.manifest["fingerprint"], 1)
    unit, group, _ = next(entry for entry in reader.units() if entry[2] == 0)
    record, views = body(root, f"records/packed/{folder(unit)}.json"), reader.views(unit, group)
    data = payload(root, record["payload"], f"samples/{folder(unit)}.HASH.tar")
    assert record["views"] == views["payload"]
    for field in ("keys", "labels", "crc32", "sizes", "skipped", "notes", "photos_sha256", "unit", "identity"):
        assert record[field] == views[field], field
    crops = [data[o : o + s] for o, s in zip(record["offsets"], record["sizes"], strict=True)]
    assert crops == reader.crops(views)
    for name, codes in record["targets"].items():
        arrays = reader.arrays(name, unit, views)
        found: dict[str, list[np.ndarray]] = {array: [] for array in arrays}
        for row, (offset, size, crc) in enumerate(zip(codes["offsets"], codes["sizes"], codes["crc32"], strict=True)):
            member = data[offset : offset + size]
            assert zlib.crc32(member) == crc
            assert member[:4] == b"tec\x03"
            assert int.from_bytes(member[4:8], "little") == record["crc32"][row]
            start = 8
            for array, dtype, shape in identity["targets"][name]["arrays"]:
                end = start + int.from_bytes(member[start + 12 : start + 16], "little")
                assert zlib.crc32(member[start:end]) == int.from_bytes(member[end : end + 4], "little")
                values = np.frombuffer(blosc.decompress(member[start:end]), dtype)
                count = math.prod(shape)
                assert len(values) == -(-count // 8) * 8
                assert not values[count:].any()
                found[array].append(values[:count].reshape(shape))
                start = end + 4
            assert start == size
        for array, values in arrays.items():
            np.testing.assert_array_equal(np.stack(found[array]), values)
        assert codes["arrays_sha256"] == hash_arrays(arrays)
        assert codes["payload"] == body(reader.root, f"records/targets/{name}/{folder(unit)}.json")["payload"]


def hash_arrays(arrays: dict[str, np.ndarray]) -> str:
    names = sorted(arrays)
    about = [[name, arrays[name].dtype.name, list(arrays[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps(about, separators=(",", ":")).encode())
    for name in names:
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("/.%~-_ aé")), max_size=12), st.integers(0, 120))
def test_the_documents_rule_for_names_is_the_programs(key: str, view: int) -> None:
    from tec_cache.cache.layout import crop_name

    name = member_name(key, view)
    assert name == crop_name(key, view)
    assert unquote(name.rpartition("-v")[0]) == key, "nothing is lost"
    assert "." not in name
    assert not name.startswith("/")


@pytest.mark.parametrize("kind", ["cache", "pack"])
def test_the_document_names_every_field_of_the_files(kind: str) -> None:
    words = set(re.findall(r"[A-Za-z_0-9]+", " ".join(re.findall(r"`([^`\n]+)`", DOCUMENT))))

    def fields(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*(fields(inner) for inner in value.values()))
        return set().union(*(fields(inner) for inner in value)) if isinstance(value, list) else set()

    for path in sorted((GOLDEN / kind).rglob("*.json")):
        found = body(GOLDEN / kind, path.relative_to(GOLDEN / kind).as_posix())
        for open_content in (found.get("notes"), found["identity"].get("base") if path.name == "target.json" else None):
            if isinstance(open_content, dict):
                open_content.clear()
        own = fields(found) - {"coded", "exact"}
        suffixed = {name for name in own if name.removesuffix("_max").removesuffix("_std") in words}
        array_names = set(found.get("blocks", {}))
        assert own - suffixed - array_names <= words, path
