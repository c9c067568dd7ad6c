"""Sealed JSON: records and manifests notice every change of themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.manifest import manifest_bytes, read_manifest
from tec_cache.cache.reader import open_cache
from tec_cache.cache.record import Payload, TargetRecord
from tec_cache.cache.sealed import seal, unseal
from tec_cache.errors import CacheError
from tec_cache.store import open_store

RECORD = TargetRecord(
    unit="000000.000-v00",
    identity="ab" * 32,
    codec_sha256="",
    count=33,
    keys_sha256="cd" * 32,
    views_sha256="ef" * 32,
    payload=Payload("targets/t/000000.000-v00.0123456789abcdef.zip", 40_000, "01" * 32),
    blocks={"features": [[1000, 30_000, 4_000_000_000], [31_000, 900, 7]]},
)


def changed(data: bytes) -> list[bytes]:
    """Every single-byte change that a flipped bit, a lost or a doubled byte can make."""
    found = []
    for i in range(len(data)):
        found += [data[:i] + bytes([data[i] ^ (1 << bit)]) + data[i + 1 :] for bit in range(8)]
        found += [data[:i] + data[i + 1 :], data[: i + 1] + data[i:]]
    found += [data + b" ", data + b"\n", b" " + data, b"", data + data]
    return [other for other in found if other != data]


def test_every_changed_byte_of_a_record_is_noticed() -> None:
    data = RECORD.to_bytes()
    assert TargetRecord.from_bytes(data) == RECORD
    assert data.endswith(b"}\n")
    for other in changed(data):
        with pytest.raises((ValueError, TypeError)):  # which `read` turns into CacheError
            TargetRecord.from_bytes(other)


def test_every_changed_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    data = manifest_bytes({"views": {"seed": 0, "scale": [0.2, 1.0]}, "name": "ü"}, {"made by": "a test"})
    path = tmp_path / layout.MANIFEST
    path.write_bytes(data)
    assert read_manifest(store, layout.MANIFEST)["identity"]["name"] == "ü"
    assert data.count(b"\n") > 10, "people read manifests too"
    for other in changed(data):
        path.write_bytes(other)
        with pytest.raises(CacheError, match="damaged manifest"):
            read_manifest(store, layout.MANIFEST)


def test_every_kind_of_json_of_a_cache_is_sealed(made_cache: Path) -> None:
    files = [p for p in made_cache.rglob("*") if p.suffix == ".json"]
    assert {p.name for p in files} >= {"cache.json", "target.json", "codec.json", "000000.json", "000000.000-v00.json"}
    for path in files:
        assert set(unseal(path.read_bytes(), indent=1 if path.name in ("cache.json", "target.json") else None))


def read_all_json(path: Path, unit: Unit) -> None:
    cache = open_cache(path)
    cache.source_record(0)
    cache["tiny"].record(unit)


@pytest.mark.parametrize("name", ["source", "views", "targets", "codec", "target", "cache"])
def test_a_changed_byte_is_an_error_that_names_the_file(made_cache: Path, tmp_path: Path, name: str) -> None:
    copied, unit = Path(shutil.copytree(made_cache, tmp_path / "cache")), Unit(0, 0, 0)
    names = {
        "source": layout.source_record(0),
        "views": layout.views_record(unit),
        "targets": layout.target_record("tiny", unit),
        "codec": layout.codec_record("tiny"),
        "target": layout.target_manifest("tiny"),
        "cache": layout.MANIFEST,
    }
    path = copied / names[name]
    data = path.read_bytes()
    for position in (0, len(data) // 3, len(data) - 2):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(CacheError, match="damaged") as error:
            read_all_json(copied, unit)
        assert error.value.where == str(path)
        assert error.value.exit_code == 3


@pytest.mark.parametrize(
    "document",
    [[], {}, {"body": {}}, {"body": 1, "sha256": "x"}, {"body": {}, "sha256": "0" * 64},
     {"body": {}, "sha256": None}, {"body": {}, "sha256": "44136fa3", "more": 1}],
)  # fmt: skip
def test_what_is_not_sealed_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match=r"not a sealed document|does not fit"):
        unseal(json.dumps(document).encode())


def test_the_same_content_written_in_another_way_is_refused() -> None:
    """One content, one file: so that a file can be compared, and no padding is outside the checksum."""
    data = seal({"a": 1, "b": [1, 2]})
    for other in (
        json.dumps(json.loads(data)).encode(),
        data.rstrip(),
        json.dumps(json.loads(data), indent=1).encode(),
    ):
        with pytest.raises(ValueError, match="changed after it was written"):
            unseal(other)
    assert unseal(data) == {"a": 1, "b": [1, 2]}
