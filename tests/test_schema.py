"""A document that is sealed correctly and says nonsense is damage: named, exit code 3, mended by --repair."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipelines.extract import extract
from pipelines.info import info
from pipelines.pack import pack
from pipelines.unpack import unpack
from pipelines.verify import verify
from tec_cache.audit.audit import audit
from tec_cache.cache.identity import canonical_json, fingerprint
from tec_cache.cache.sealed import MIDDLE, TAIL
from tec_cache.errors import CacheError
from tec_cache.store import open_store
from tests.conftest import files_below, load_everything, tiny_config, write_shards

DEEP = 100_000
ODD = [
    "null", "true", "-1", "0", "1.5", "1e999", "NaN", "-0.0", "2147483648", "9007199254740993", "1" + "0" * 400, '""',
    '"x"', '"../../../x"', '"\\ud800"', '"' + "f" * 64 + '"', "[]", "{}", "[[]]", '[{"a":[1]}]', '{"a":{}}',
    "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 200 + "]" * 200,
]  # fmt: skip
"""What stands in the place of each value, as JSON or what looks like it."""

PLACE = "@@ a value @@"


class Mutant(NamedTuple):
    """A document with one value replaced, sealed correctly again."""

    name: str
    path: tuple[str | int, ...]
    odd: str
    data: bytes

    def __str__(self) -> str:
        return f"{self.name} {'.'.join(map(str, self.path))} = {self.odd[:24]}"


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """List where values stand in a document: all of an object's, the first of a list."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and value:
        items = [(0, value[0])]
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutant(data: bytes, path: tuple[str | int, ...], odd: str, *, known: bool) -> bytes:
    """Put an odd value into a document and seal it; known: a manifest's fingerprint is made to fit."""
    head = data[: data.index(b'"body":') + len(b'"body":')]
    body = json.loads(data[len(head) : -78])
    inner: Any = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = PLACE
    if known and path[0] == "identity":
        try:
            whole = json.loads(canonical_json(body["identity"]).decode().replace(f'"{PLACE}"', odd))
            body["fingerprint"] = fingerprint(whole)
        except (ValueError, RecursionError):
            pass  # there is none
    indent, separators = (1, None) if data[len(head) :].startswith(b"{\n") else (None, (",", ":"))
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, indent=indent, separators=separators)
    changed = head + text.replace(f'"{PLACE}"', odd).encode()
    return changed + MIDDLE + hashlib.sha256(changed).hexdigest().encode() + TAIL


SIZES = (("payload", "size"), ("views", "size"))
"""Where a document says how large a payload is."""


def mutants(folder: Path, seed: int, each: int) -> list[Mutant]:
    """Replace every value of every document of a cache by `each` odd ones."""
    rng, found = random.Random(seed), []
    for path in sorted(folder.rglob("*.json")):
        data, name = path.read_bytes(), path.relative_to(folder).as_posix()
        for place in places(json.loads(data)["body"]):
            for odd in rng.sample(ODD, each):
                changed = mutant(data, place, odd, known=rng.random() < 0.5)
                if changed != data:
                    found.append(Mutant(name, place, odd, changed))
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("few"), [3])


@pytest.fixture(scope="module")
def small(photos: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one document of each kind."""
    cache = tmp_path_factory.mktemp("caches") / "small"
    extract(tiny_config(photos, cache, tiny_base, views=1))
    return cache


@pytest.fixture(scope="module")
def packed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "pack"
    pack(str(small), str(out))
    return out


def copy_without_index(folder: Path, path: Path) -> Path:
    """Copy a cache or pack, so that its records are what is read."""
    shutil.copytree(folder, path)
    shutil.rmtree(path / "index")
    return path


def check(path: Path) -> None:
    """Audit a cache to the last byte: never an exception."""
    if path.name != "pack":
        report = audit(open_store(path), full=True)
        assert all(finding.where and finding.what for finding in report.findings)


def survived(mutant: Mutant, path: Path, use: Callable[[Path], object]) -> bool:
    """Use a cache with a mutant in it; say whether it was taken. Only CacheError may come: exit code 3."""
    try:
        use(path)
    except CacheError:
        return False
    except Exception as error:
        raise AssertionError(f"{mutant}: {type(error).__name__} from {use.__name__}") from error
    return True


@pytest.mark.parametrize("kind", ["cache", "pack"])
def test_no_sealed_nonsense_is_a_bug_of_ours(small: Path, packed: Path, tmp_path: Path, kind: str) -> None:
    """Every value of every document, replaced: refused as damage by whatever reads it, or harmless."""
    path = copy_without_index(small if kind == "cache" else packed, tmp_path / kind)
    taken = set()
    found = mutants(path, seed=1, each=2)
    assert len(found) > 200
    for mutant in found:
        file = path / mutant.name
        before = file.read_bytes()
        file.write_bytes(mutant.data)
        uses = [survived(mutant, path, use) for use in (lambda p: info(str(p)), load_everything, check)]
        if all(uses[:2]):
            taken.add("size" if mutant.path[-2:] in SIZES else mutant.path[0])
        file.write_bytes(before)
    load_everything(path)
    # what decides nothing, and numbers and texts that may be any; a payload is read by ranges, its size is verify's
    assert taken <= {"size", "notes", "errors", "fitted_views", "checked_views", "labels", "identity"}


@pytest.mark.parametrize("odd", [odd for odd in ODD if len(odd) > 300 or odd in ("NaN", "1e999", '"\\ud800"', "null")])
def test_verify_names_the_file_and_repair_mends_it(
    small: Path, photos: Path, tiny_base: Path, tmp_path: Path, odd: str
) -> None:
    cache, whole = tmp_path / "cache", files_below(small)
    rng = random.Random(len(odd))
    records = sorted(name for name in whole if name.startswith("records/"))
    assert len(records) == 5
    shutil.copytree(small, cache)
    for name in records:
        place = rng.choice(list(places(json.loads(whole[name])["body"])))
        (cache / name).write_bytes(mutant(whole[name], place, odd, known=False))
    verdict = verify(str(cache), full=True)
    assert {f.where for f in verdict.findings if f.level == "damage"} >= set(records)
    verify(str(cache), full=True, repair=True)
    extract(tiny_config(photos, cache, tiny_base, views=1))
    assert files_below(cache) == whole


def resealed(data: bytes, harm: str) -> bytes:
    """Give a document another field, or lack one; the document itself where it has no place for that."""
    head = data[: data.index(b'"body":') + len(b'"body":')]
    body, indent = json.loads(data)["body"], 1 if data[len(head) :].startswith(b"{\n") else None
    if harm == "unknown":
        body["more"] = 1
    elif harm == "missing":
        del body[sorted(body)[-1]]
    elif harm == "nested":
        nested = body.get("identity") if indent else body.get("payload")
        if not isinstance(nested, dict):
            return data
        nested["more"] = 1
        if indent:
            body["fingerprint"] = fingerprint(body["identity"])
    text = json.dumps(body, sort_keys=True, indent=indent, separators=None if indent else (",", ":"))
    if harm == "duplicate":
        text = text.replace("{", f'{{"{sorted(body)[0]}":1,', 1)
    changed = head + text.encode()
    return changed + MIDDLE + hashlib.sha256(changed).hexdigest().encode() + TAIL


@pytest.mark.parametrize("harm", ["missing", "duplicate"])
def test_a_field_that_is_missing_or_there_twice_is_damage(small: Path, tmp_path: Path, harm: str) -> None:
    path = copy_without_index(small, tmp_path / "cache")
    for file in sorted(path.rglob("*.json")):
        data = file.read_bytes()
        file.write_bytes(resealed(data, harm))
        with pytest.raises(CacheError, match="damaged") as error:
            load_everything(path)
        assert error.value.exit_code == 3
        assert str(file) in error.value.where
        file.write_bytes(data)


@pytest.mark.parametrize("kind", ["cache", "pack"])
@pytest.mark.parametrize("harm", ["unknown", "nested"])
def test_fields_that_this_version_does_not_know_are_not_looked_at(
    small: Path, packed: Path, tmp_path: Path, harm: str, kind: str
) -> None:
    """A later program may add what need not be understood; what is bound to the very document says so, as ever."""
    path = copy_without_index(small if kind == "cache" else packed, tmp_path / kind)
    taken, refused = set(), {}
    for file in sorted(path.rglob("*.json")):
        data, name = file.read_bytes(), file.relative_to(path).as_posix()
        changed = resealed(data, harm)
        if changed == data:
            continue
        file.write_bytes(changed)
        try:
            load_everything(path)
        except CacheError as error:
            refused[name] = error.what
        else:
            taken.add(name)
        file.write_bytes(data)
    assert not [what for what in refused.values() if "damaged" in what or "missing" in what]
    # an identity with another field is another identity, and the photos' record is known by its hash
    bound = {"unknown": {"records/source/000000.json"}, "nested": {"cache.json", "targets/tiny/target.json"}}[harm]
    assert set(refused) == bound
    assert any(name.endswith("v00.json") for name in taken)


def test_no_name_from_a_document_leaves_the_folder(small: Path, packed: Path, tmp_path: Path) -> None:
    """Payload names are made anew from unit and hash, whoever reads the record: here unpacking and verifying."""
    for kind, folder in (("cache", small), ("pack", packed)):
        path = copy_without_index(folder, tmp_path / kind)
        for file in sorted((path / "records").rglob("*.json")):
            data = file.read_bytes()
            names = [p for p in places(json.loads(data)["body"]) if p[-1] == "name"]
            for place in names:
                for odd in ('"../../escaped"', '"/tmp/escaped"', '"cache.json"'):
                    file.write_bytes(mutant(data, place, odd, known=False))
                    with pytest.raises(CacheError, match="which is not this"):
                        load_everything(path)
                    if kind == "pack":
                        with pytest.raises(CacheError, match="which is not this"):
                            unpack(str(path), str(tmp_path / "out"))
                        shutil.rmtree(tmp_path / "out", ignore_errors=True)
            file.write_bytes(data)
    assert not list(tmp_path.rglob("*escaped*"))
