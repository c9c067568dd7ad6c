"""Sealed JSON: records and manifests notice every change of themselves."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tec_cache.cache import layout
from tec_cache.cache.identity import fingerprint
from tec_cache.cache.layout import Unit
from tec_cache.cache.manifest import ensure_manifest, read_manifest
from tec_cache.cache.opening import open_cache
from tec_cache.cache.record import Payload, TargetRecord
from tec_cache.cache.sealed import FORMAT, MAGIC, MIDDLE, TAIL, OtherFormat, seal, unseal
from tec_cache.errors import CacheError
from tec_cache.store import open_store
from tests.sealing import PEOPLE_READ, kind_of, reseal, unsealed

RECORD = TargetRecord(
    unit="000000.000-v00",
    identity="ab" * 32,
    codec_sha256="",
    count=33,
    keys_sha256="cd" * 32,
    views_sha256="ef" * 32,
    payload=Payload("targets/t/000000/000000.000-v00.0101010101010101.zip", 40_000, "01" * 32),
    blocks={"features": [[1000, 30_000, 4_000_000_000], [31_000, 900, 7]]},
)

NAME = layout.target_record("t", Unit(0, 0, 0))


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
    assert TargetRecord.from_bytes(data, NAME) == RECORD
    assert data.endswith(b"}\n")
    for other in changed(data):
        with pytest.raises(ValueError):  # noqa: PT011  (which `read` turns into CacheError)
            TargetRecord.from_bytes(other, NAME)


def test_every_changed_byte_of_a_manifest_is_noticed(made_cache: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    identity = open_cache(made_cache).identity | {"source": {"limit": None, "shards": [{"name": "ü"}]}}
    ensure_manifest(store, layout.MANIFEST, identity, {"made by": "a test"}, what="", todo="")
    path = tmp_path / layout.MANIFEST
    data = path.read_bytes()
    assert read_manifest(store, layout.MANIFEST)["identity"]["source"]["shards"] == [{"name": "ü"}]
    assert data.count(b"\n") > 10, "people read manifests too"
    for other in changed(data):
        path.write_bytes(other)
        with pytest.raises(CacheError, match="damaged manifest"):
            read_manifest(store, layout.MANIFEST)


def test_every_kind_of_json_of_a_cache_is_sealed(made_cache: Path) -> None:
    files = [p for p in made_cache.rglob("*") if p.suffix == ".json"]
    assert {p.name for p in files} >= {"cache.json", "target.json", "codec.json", "000000.json", "000000.000-v00.json"}
    kinds = {path: kind_of(path.read_bytes()) for path in files}
    assert set(kinds.values()) == {"cache", "target", "codec", "asked", "source", "content", "views", "targets"}
    for path, kind in kinds.items():
        assert unsealed(path)
        other = "views" if kind != "views" else "targets"
        with pytest.raises(ValueError, match=f"of kind '{kind}', not '{other}'"):
            unseal(path.read_bytes(), other, indent=1 if kind in PEOPLE_READ else None)


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
        unseal(json.dumps(document, separators=(",", ":")).encode() + b"\n", "views")


@pytest.mark.parametrize(
    "body",
    [b"[]", b"1", b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":1e999}', b'{"a":1E2}',
     b'{"a":"\\ud800"}', b'{"a":"\\u0041"}', b'{"a":"\xff"}', b'{"a":1}{"a":1}', b"[" * 100_000,
     b'{"a":' * 100_000, b'{"a":' + b"9" * 5000 + b"}", b"", b"\xef\xbb\xbf{}"],
    ids=lambda body: str(body[:16]),
)  # fmt: skip
@pytest.mark.parametrize("indent", [None, 1])
def test_a_body_that_seal_would_not_write_is_refused_though_its_hash_fits(body: bytes, indent: int | None) -> None:
    text = b'{"tec-cache":"views","format":3,"body":' + body
    sealed = text + MIDDLE + hashlib.sha256(text).hexdigest().encode() + TAIL
    with pytest.raises(ValueError):  # noqa: PT011  (json has many words for it)
        unseal(sealed, "views", indent=indent)


def test_the_same_content_written_in_another_way_is_refused() -> None:
    """One content, one file: so that a file can be compared, and no padding is outside the checksum."""
    body = {"a": 1, "b": [1, 2]}
    data = seal("views", body)
    for other in (
        json.dumps(json.loads(data)).encode(),
        data.rstrip(),
        json.dumps(json.loads(data), indent=1).encode(),
    ):
        with pytest.raises(ValueError, match="not a sealed document"):
            unseal(other, "views")
    with pytest.raises(ValueError, match="not written as it has to be"):
        unseal(seal("views", body, indent=1), "views")
    assert unseal(data, "views") == unseal(seal("views", body, indent=1), "views", indent=1) == body


@pytest.mark.parametrize("indent", [None, 1])
def test_the_hash_is_that_of_all_bytes_before_it(indent: int | None) -> None:
    """Nobody has to write numbers again to check a document: it is all but the last 78 bytes."""
    data = seal("views", {"x": 1e-7, "y": "ü", "z": [1.0, 2]}, indent=indent)
    document = json.loads(data)
    assert document["sha256"] == hashlib.sha256(data[:-78]).hexdigest()
    assert (document["tec-cache"], document["format"]) == ("views", FORMAT)
    assert data.startswith(MAGIC)


def test_another_version_is_told_apart_from_damage() -> None:
    """A later program's document is whole: it must not be dropped as damage."""
    text = seal("views", {"a": 1})[:-78].replace(b'"format":3', b'"format":17')
    data = text + MIDDLE + hashlib.sha256(text).hexdigest().encode() + TAIL
    with pytest.raises(OtherFormat, match="format version 17, this program reads 3"):
        unseal(data, "views")
    with pytest.raises(ValueError, match="SHA-256"):
        unseal(data.replace(b":17,", b":18,"), "views")


def test_a_field_of_a_later_program_is_kept_and_not_looked_at(made_cache: Path, tmp_path: Path) -> None:
    """The hash of a record is that of its file, whatever it holds besides, and copies of it are the same file."""
    copied, unit = Path(shutil.copytree(made_cache, tmp_path / "cache")), Unit(0, 0, 0)
    shutil.rmtree(copied / "index")
    later = {"later": [1, {"a": None}]}
    for name in (layout.views_record(unit), layout.target_record("tiny", unit)):
        reseal(copied / name, unsealed(copied / name) | later)
    cache = open_cache(copied)
    data = (copied / layout.views_record(unit)).read_bytes()
    record = cache.views_record(unit)
    assert record == open_cache(made_cache).views_record(unit)
    assert record.to_bytes() == data
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert cache["tiny"].record(unit) == open_cache(made_cache)["tiny"].record(unit)
    source = layout.source_record(0)
    reseal(copied / source, unsealed(copied / source) | later)
    with pytest.raises(CacheError, match="other photos when this cache was finished"):
        open_cache(copied).source_record(0)
    identity = open_cache(made_cache).identity | {"later": 1}
    body = unsealed(copied / layout.MANIFEST)
    reseal(copied / layout.MANIFEST, body | {"identity": identity, "fingerprint": fingerprint(identity)})
    assert open_cache(copied).identity["later"] == 1, "it may decide what the bytes mean to a later program"
