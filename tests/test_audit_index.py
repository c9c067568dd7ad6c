"""`verify` and the index: one that does not fit the records is named, and made again by --repair."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.extract import extract
from pipelines.index import index
from pipelines.info import info
from pipelines.verify import verify
from tec_cache.audit.audit import audit
from tec_cache.audit.findings import Finding
from tec_cache.cache import layout
from tec_cache.cache.index.table import ENTRY, PROLOGUE, read_table
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.errors import CacheError
from tec_cache.store import open_store
from tests.conftest import files_below, load_everything, tiny_config, write_shards
from tests.sealing import reseal, unsealed

VIEWS, TARGETS = layout.views_index(), layout.target_index("tiny")
UNIT = Unit(0, 1, 1)


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six units of views and of targets."""
    folder = tmp_path_factory.mktemp("audit-index")
    extract(tiny_config(write_shards(folder / "photos", [14, 7]), folder / "cache", tiny_base, group_size=8))
    return folder / "cache"


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def found(path: Path, *, full: bool = True) -> list[Finding]:
    return audit(open_store(path), full=full).findings


def resealed(file: Path, change: Callable[[np.ndarray], None]) -> None:
    """Change the table of an index as a faulty program would: with a right SHA-256."""
    data, table = bytearray(file.read_bytes()), read_table(open_store(file.parent), file.name)
    entries = table.entries.copy()
    change(entries)
    start = len(data) - len(table.heading) - entries.nbytes
    data[start : start + entries.nbytes] = entries.tobytes()
    head = bytes(data[: PROLOGUE - 32])
    data[PROLOGUE - 32 : PROLOGUE] = hashlib.sha256(head + bytes(data[start:])).digest()
    file.write_bytes(data)


def other_rows(entries: np.ndarray) -> None:
    entries["rows"][3] -= 1


def other_payload(entries: np.ndarray) -> None:
    entries["payload_sha256"][3] = entries["payload_sha256"][2]


def other_skipped(entries: np.ndarray) -> None:
    entries["noted"][3] = 1


def other_record(entries: np.ndarray) -> None:
    entries["record_bytes"][3] += 1


def other_details(entries: np.ndarray) -> None:
    entries["details_crc32"][3] ^= 1


@pytest.mark.parametrize("name", [VIEWS, TARGETS])
@pytest.mark.parametrize("harm", ["cut", "empty", "not an index", "flipped table", "flipped heading"])
def test_a_damaged_index_is_a_note_and_repaired(cache: Path, name: str, harm: str) -> None:
    before, file = files_below(cache), cache / name
    data = bytearray(file.read_bytes())
    if harm.startswith("flipped"):
        data[-ENTRY.itemsize - 200 if harm == "flipped table" else -5] ^= 1
    file.write_bytes({"cut": data[:-1], "empty": b"", "not an index": b"mine" * 99}.get(harm, bytes(data)))
    verdict = verify(str(cache))
    (finding,) = verdict.findings
    assert (finding.kind, finding.level, finding.where) == ("index", "note", name)
    assert "tec-cache index CACHE makes it again" in finding.todo
    assert verdict.clean, "the records are there"
    load_everything(cache)
    repaired = verify(str(cache), repair=True)
    assert ([f.where for f in repaired.dropped], repaired.findings, repaired.next) == ([name], [], [])
    assert files_below(cache) == before


@pytest.mark.parametrize("name", [VIEWS, TARGETS])
@pytest.mark.parametrize("change", [other_payload, other_skipped, other_record, other_details])
def test_an_index_that_says_otherwise_than_the_records(
    cache: Path, name: str, change: Callable[[np.ndarray], None]
) -> None:
    """It is whole by its own checksum, and only the records tell."""
    before = files_below(cache)
    resealed(cache / name, change)
    findings = found(cache, full=False)
    assert [(f.kind, f.where) for f in findings if f.where == name] == [("index", name)]
    # an index of targets is compared with that of the views when it is opened
    assert {f.where for f in findings} <= {name, TARGETS}
    verify(str(cache), repair=True)
    assert files_below(cache) == before


def test_an_index_with_another_number_of_rows(cache: Path) -> None:
    before = files_below(cache)
    for name in (VIEWS, TARGETS):
        resealed(cache / name, other_rows)
    assert [(f.kind, f.where) for f in found(cache, full=False)] == [("index", VIEWS), ("index", TARGETS)]
    assert "they say otherwise of 1: 000000.001-v01" in found(cache)[0].what
    index(str(cache))
    assert files_below(cache) == before


@pytest.mark.parametrize("name", [VIEWS, TARGETS])
def test_details_are_looked_at_by_a_full_audit(cache: Path, name: str) -> None:
    before = files_below(cache)
    data = bytearray((cache / name).read_bytes())
    data[PROLOGUE + 3] ^= 1
    (cache / name).write_bytes(data)
    assert found(cache, full=False) == []
    (finding,) = found(cache)
    assert (finding.kind, finding.where) == ("index", name)
    assert "the details of unit 000000.000-v00 are damaged" in finding.what
    load_everything(cache)
    verify(str(cache), full=True, repair=True)
    assert files_below(cache) == before


def test_a_record_that_changed_under_its_index(cache: Path) -> None:
    """A record of the same unit, whole and longer than the one that the index was made of."""
    name = layout.target_record("tiny", UNIT)
    reseal(cache / name, unsealed(cache / name) | {"later": 1})
    (finding,) = found(cache, full=False)
    assert (finding.kind, finding.where) == ("index", TARGETS)
    assert str(UNIT) in finding.what
    assert index(str(cache)).targets == {"tiny": 2}
    assert found(cache) == []


def test_no_index_is_nothing_to_be_told_and_repair_makes_one(cache: Path) -> None:
    before = files_below(cache)
    shutil.rmtree(cache / "index")
    assert found(cache) == []
    assert info(str(cache))["index"] == "absent"
    verify(str(cache), repair=True)
    assert files_below(cache) == before


@pytest.mark.parametrize(
    "name",
    [layout.views_record(UNIT), layout.target_record("tiny", UNIT), layout.source_record(1), layout.CONTENT_RECORD,
     layout.asked_record(1)],
)  # fmt: skip
def test_what_is_missing_is_told_and_not_that_the_index_knows_more(cache: Path, name: str) -> None:
    (cache / name).unlink()
    findings = found(cache)
    assert {f.where for f in findings if f.level == "missing"} >= {name}
    assert "index" not in {f.kind for f in findings}


@pytest.mark.parametrize("name", [layout.views_record(UNIT), layout.target_record("tiny", UNIT)])
def test_a_record_that_is_gone_is_noticed_though_the_index_knows_it(cache: Path, name: str) -> None:
    (cache / name).unlink()
    with pytest.raises(CacheError, match="units are missing"):
        load_everything(cache)
    assert str(UNIT) in open_cache(cache).index_problem + open_cache(cache)["tiny"].index_problem


def test_damage_costs_the_index_of_what_is_incomplete_then(cache: Path) -> None:
    """What is still whole keeps an index."""
    name = layout.target_record("tiny", UNIT)
    (cache / name).write_bytes(b"{}")
    verdict = verify(str(cache), repair=True)
    assert [f.where for f in verdict.dropped] == [name]
    assert open_cache(cache).index is not None
    first = open_cache(cache)["tiny"].index
    assert first is not None
    assert first.heading.num_views == 1
    assert not [f for f in verdict.findings if f.kind == "index"]


def test_what_lies_among_the_indices(cache: Path) -> None:
    (cache / "index" / "notes.txt").write_text("mine")
    shutil.copy(cache / TARGETS, cache / layout.target_index("old"))
    kinds = {f.where: f.kind for f in found(cache)}
    assert kinds == {"index/notes.txt": "unknown", layout.target_index("old"): "leftover"}
    verdict = verify(str(cache), repair=True)
    assert verdict.removed == [layout.target_index("old")]
    assert [f.where for f in verdict.findings] == ["index/notes.txt"]
    assert (cache / "index" / "notes.txt").read_text() == "mine"


def test_an_index_does_not_hide_that_more_views_were_asked_for(cache: Path) -> None:
    """As many records of what was asked for as the index has views, and not those of its views."""
    third = cache / layout.asked_record(2)
    shutil.copy(cache / layout.asked_record(1), third)
    reseal(third, unsealed(third) | {"view": 2})
    (cache / layout.asked_record(1)).unlink()
    opened = open_cache(cache)
    assert opened.index is not None
    assert (opened.asked_views, opened.num_views) == ([0, 2], 3)
