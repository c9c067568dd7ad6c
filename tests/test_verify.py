"""`verify`: every harm is noticed and named, repairing makes the same bytes again, the base is held to its word."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import pipelines.checking.base_check
from cli import cli
from pipelines.extract import extract
from pipelines.verify import Verdict, verify
from tec_cache.audit.audit import audit
from tec_cache.audit.findings import Finding
from tec_cache.audit.payloads import check_payload, tar_problem, zip_problem
from tec_cache.cache import layout
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import TargetRecord, ViewsRecord, hash_keys
from tec_cache.cache.sealed import seal
from tec_cache.cache.writer import TargetArrays, commit_targets
from tec_cache.errors import CacheError, ConfigError, TecCacheError
from tec_cache.store import open_store
from tec_cache.store.local import LocalStore
from tests.conftest import files_below, tiny_config, write_shards, write_tiny_base
from tests.sealing import reseal, unsealed

UNIT, OTHER, SISTER = Unit(0, 0, 0), Unit(0, 1, 0), Unit(0, 0, 1)
"""A unit, one of other photos, and another view of the same photos."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("verify"), [14, 7])


@pytest.fixture(scope="module")
def made(photos: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Caches of six units, one of each quality."""
    caches = {}

    def make(quality: str) -> Path:
        if quality not in caches:
            caches[quality] = tmp_path_factory.mktemp("caches") / quality
            run(photos, caches[quality], tiny_base, quality)
        return caches[quality]

    return make


def run(photos: Path, cache: Path, base: Path, quality: str = "default", **changes: object) -> None:
    extract(tiny_config(photos, cache, base, **({"quality": quality, "group_size": 8} | changes)))


@pytest.fixture
def cache(made: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("default"), tmp_path / "cache"))


def whole(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_below(path).items() if name != ".lock"}


def found(path: Path, *, full: bool = True) -> list[Finding]:
    return audit(open_store(path), full=full).findings


def tar_of(path: Path, unit: Unit = UNIT) -> str:
    payload = open_cache(path).views_record(unit).payload
    assert payload is not None
    return payload.name


def zip_of(path: Path, unit: Unit = UNIT) -> str:
    payload = open_cache(path)["tiny"].record(unit).payload
    assert payload is not None
    return payload.name


def flip(file: Path, position: int, bit: int = 0) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << bit]))


@contextmanager
def flipped(file: Path, position: int, bit: int) -> Iterator[None]:
    flip(file, position, bit)
    yield
    flip(file, position, bit)


def two_hundred_flips(files: dict[str, int], seed: int) -> list[tuple[str, int, int]]:
    """Draw (name, byte, bit): 100 uniform over all bytes, 100 uniform over files."""
    rng, names = np.random.default_rng(seed), list(files)
    ends = np.cumsum(list(files.values()))
    flips = []
    for place in rng.integers(ends[-1], size=100):
        number = int(np.searchsorted(ends, place, side="right"))
        flips.append((names[number], int(place - (ends[number] - files[names[number]]))))
    flips += [(name, int(rng.integers(files[name]))) for name in rng.choice(names, 100)]
    return [(name, position, int(rng.integers(8))) for name, position in flips]


def bytes_of_training(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Compute from the records which ranges of which files the training reads."""
    cache = open_cache(path)
    target = cache["tiny"]
    read = {name: [(0, len(data))] for name, data in whole(path).items() if name.endswith((".json", ".safetensors"))}
    for unit in cache.view_units:
        views, record = cache.views_record(unit), target.record(unit)
        assert views.payload is not None
        assert record.payload is not None
        read[views.payload.name] = [(o, o + s) for o, s in zip(views.offsets, views.sizes, strict=True)]
        read[record.payload.name] = [(p, p + s) for blocks in record.blocks.values() for p, s, _ in blocks]
    # where the index is damaged all records are read, and it says itself how many views were asked for
    return read | {name: [] for name in read.keys() | whole(path) if name.startswith(("index/", "records/asked/"))}


def read_everything(path: Path) -> None:
    """Read what the loader reads in as many epochs as there are views."""
    cache = open_cache(path)
    cache.require_complete(cache.num_views)
    cache.require_complete(cache.num_views, "tiny")
    target = cache["tiny"]
    _ = target.codec
    for unit, views in zip(cache.view_units, cache.views_records(cache.view_units), strict=True):
        record = target.record(unit, views)
        for number in range(-(-record.count // BLOCK_ROWS)):
            rows = range(number * BLOCK_ROWS, min(record.count, (number + 1) * BLOCK_ROWS))
            cache.read_crops(views, rows)
            target.read_block(record, number)


def error_of(path: Path) -> str | None:
    """Return where reading fails, None where it does not."""
    try:
        read_everything(path)
    except CacheError as error:
        return error.where
    return None


@pytest.mark.parametrize("quality", ["exact", "default"])
def test_two_hundred_single_bit_flips_are_noticed_and_named(
    made: Callable[[str], Path], tmp_path: Path, quality: str
) -> None:
    path = Path(shutil.copytree(made(quality), tmp_path / "cache"))
    before, read = whole(path), bytes_of_training(path)
    assert found(path) == []
    hits = 0
    for name, position, bit in two_hundred_flips({n: len(data) for n, data in before.items()}, seed=7):
        touched = any(start <= position < stop for start, stop in read[name])
        hits += touched
        with flipped(path / name, position, bit):
            assert [finding.where for finding in found(path)] == [name], (name, position, bit)
            place = error_of(path)
            assert (place is not None) == touched, (name, position, bit, place)
            assert place is None or name in place or str(layout.unit_of(name)) in place
    assert 100 < hits < 200, "both kinds of bytes were hit"
    assert whole(path) == before
    read_everything(path)


def swap(path: Path, first: str, second: str) -> list[str]:
    one, two = (path / first).read_bytes(), (path / second).read_bytes()
    (path / first).write_bytes(two)
    (path / second).write_bytes(one)
    return sorted([first, second])


def truncated(path: Path, name: str) -> list[str]:
    (path / name).write_bytes((path / name).read_bytes()[:-1])
    return [name]


def gone(path: Path, name: str) -> list[str]:
    (path / name).unlink()
    return [name]


def changed(path: Path, name: str) -> list[str]:
    flip(path / name, (path / name).stat().st_size // 2)
    return [name]


def foreign(path: Path, name: str) -> list[str]:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("{}")
    return [name]


def rewritten(path: Path, name: str, **values: object) -> list[str]:
    """Write a record anew with other values and a right checksum."""
    reseal(path / name, unsealed(path / name) | values)
    return [name]


def empty_unit(path: Path, unit: Unit) -> list[str]:
    """Write a sound record of a unit whose photos are all broken."""
    lists: dict[str, list] = {n: [] for n in ("keys", "labels", "offsets", "sizes", "crc32", "skipped")}
    body = lists | {"identity": open_cache(path).fingerprint, "keys_sha256": hash_keys([]), "payload": None}
    record = path / layout.views_record(unit)
    record.parent.mkdir(exist_ok=True)
    record.write_bytes(seal("views", body))
    return [layout.views_record(unit)]


def sister(path: Path) -> dict:
    return unsealed(path / layout.target_record("tiny", SISTER))


HARMS: dict[str, Callable[[Path], list[str]]] = {
    "tar changed": lambda p: changed(p, tar_of(p)),
    "tar truncated": lambda p: truncated(p, tar_of(p)),
    "tar gone": lambda p: gone(p, tar_of(p)),
    "tars swapped": lambda p: swap(p, tar_of(p), tar_of(p, SISTER)),
    "zip changed": lambda p: changed(p, zip_of(p)),
    "zip truncated": lambda p: truncated(p, zip_of(p)),
    "zip gone": lambda p: gone(p, zip_of(p)),
    "zips swapped": lambda p: swap(p, zip_of(p), zip_of(p, OTHER)),
    "views record changed": lambda p: changed(p, layout.views_record(UNIT)),
    "views record truncated": lambda p: truncated(p, layout.views_record(UNIT)),
    "views records swapped": lambda p: swap(p, layout.views_record(UNIT), layout.views_record(SISTER)),
    "target record changed": lambda p: changed(p, layout.target_record("tiny", UNIT)),
    "target records swapped": lambda p: swap(
        p, layout.target_record("tiny", UNIT), layout.target_record("tiny", OTHER)
    ),
    "target record of another set": lambda p: rewritten(p, layout.target_record("tiny", UNIT), identity="0" * 64),
    "target record of another codec": lambda p: rewritten(p, layout.target_record("tiny", UNIT), codec_sha256="0"),
    "views record of another cache": lambda p: rewritten(p, layout.views_record(UNIT), identity="0" * 64),
    "record of nonsense": lambda p: rewritten(p, layout.target_record("tiny", UNIT), blocks={"features": 3}),
    "source record changed": lambda p: changed(p, layout.source_record(1)),
    "source records swapped": lambda p: swap(p, layout.source_record(0), layout.source_record(1)),
    "a unit of no shard": lambda p: empty_unit(p, Unit(9, 0, 0)),
    "targets of other crops": lambda p: rewritten(p, layout.target_record("tiny", UNIT), views_sha256="0" * 64),
    "the zip of another unit": lambda p: rewritten(
        p, layout.target_record("tiny", UNIT), **{n: sister(p)[n] for n in ("payload", "blocks")}
    ),
}  # fmt: skip
"""Each harms a cache and returns the files that are wrong now."""


@pytest.mark.parametrize("harm", HARMS)
def test_harm_is_named_dropped_and_made_again_to_the_byte(
    cache: Path, photos: Path, tiny_base: Path, harm: str
) -> None:
    before = whole(cache)
    names = HARMS[harm](cache)
    verdict = verify(str(cache), full=True)
    assert {f.where for f in verdict.findings if f.level == "damage"} == set(names)
    assert all(finding.what and finding.todo for finding in verdict.findings)
    repaired = verify(str(cache), full=True, repair=True)
    assert {finding.where for finding in repaired.dropped} == set(names)
    assert repaired.count("damage") == 0
    assert not any((cache / name).exists() for name in names)
    run(photos, cache, tiny_base)
    assert verify(str(cache), full=True).clean
    assert whole(cache) == before


def test_without_full_sizes_are_looked_at_and_no_content(cache: Path) -> None:
    changed(cache, tar_of(cache))
    assert found(cache, full=False) == []
    names = truncated(cache, zip_of(cache))
    assert [finding.where for finding in found(cache, full=False)] == names


@pytest.mark.parametrize("name", ["cache.json", "targets/tiny/target.json", "targets/tiny/codec.json", "codec"])
def test_what_all_units_hang_on_is_explained_and_never_dropped(
    cache: Path, photos: Path, tiny_base: Path, name: str
) -> None:
    before = whole(cache)
    if name == "codec":
        (name,) = (n for n in before if n.endswith(".safetensors"))
    changed(cache, name)
    harmed = whole(cache)
    verdict = verify(str(cache), full=True, base=True, repair=True)
    assert [finding.where for finding in verdict.findings] == [name]
    assert "restore it from a copy" in verdict.findings[0].todo
    assert verdict.dropped == []
    assert whole(cache) == harmed
    # and what it says can be done works
    (cache / name).unlink()
    assert [f.where for f in found(cache) if f.level == "damage"] == [name]
    if name in ("cache.json", "targets/tiny/target.json"):
        run(photos, cache, tiny_base)
    else:
        (cache / name).write_bytes(harmed[name])
        config = tiny_config(photos, cache, tiny_base, quality="default", group_size=8)
        extract(config, overwrite=True)
    assert whole(cache) == before


def test_a_manifest_of_another_cache_does_not_cost_the_records(
    cache: Path, photos: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run(photos, tmp_path / "other", tiny_base, "exact", seed=5)
    for name in ("cache.json", "targets/tiny/target.json"):
        mine = (cache / name).read_bytes()
        shutil.copy(tmp_path / "other" / name, cache / name)
        harmed = whole(cache)
        verdict = verify(str(cache), repair=True)
        assert verdict.dropped == []
        assert whole(cache) == harmed
        assert {f.where for f in verdict.findings} & {name, "targets/tiny/target.json"}
        (cache / name).write_bytes(mine)


def test_missing_is_told_apart_from_damage(cache: Path) -> None:
    (cache / layout.target_record("tiny", UNIT)).unlink()
    (cache / layout.source_record(1)).unlink()
    verdict = verify(str(cache))
    assert (verdict.count("damage"), verdict.count("missing"), verdict.count("note")) == (0, 2, 1)
    assert not verdict.clean
    by_level = {finding.level: finding.where for finding in verdict.findings if finding.level != "missing"}
    assert by_level == {"note": zip_of_name(verdict)}
    missing = {finding.where for finding in verdict.findings if finding.level == "missing"}
    assert missing == {layout.target_record("tiny", UNIT), layout.source_record(1)}
    verify(str(cache), repair=True)
    assert verify(str(cache)).count("note") == 0, "what no record names is removed"


def zip_of_name(verdict: Verdict) -> str:
    (note,) = (finding.where for finding in verdict.findings if finding.kind == "leftover")
    return note


def test_notes_are_no_error_and_strangers_are_left_alone(cache: Path) -> None:
    leftover = f"views/{UNIT.folder}/{UNIT}.{'0' * 16}.tar"
    (cache / leftover).write_bytes(b"of a killed job")
    (cache / "targets" / "tiny" / "README").write_text("mine")
    verdict = verify(str(cache))
    assert verdict.clean
    assert sorted(finding.kind for finding in verdict.findings) == ["leftover", "unknown"]
    assert verify(str(cache), repair=True).removed == [leftover]
    assert (cache / "targets" / "tiny" / "README").exists()


def test_records_without_their_target_set(cache: Path) -> None:
    (cache / "targets" / "tiny" / "target.json").unlink()
    verdict = verify(str(cache), repair=True)
    assert [finding.where for finding in verdict.findings] == ["targets/tiny/target.json"]
    assert verdict.dropped == []


def test_a_failing_disk_drops_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, before, read = layout.views_record(UNIT), whole(cache), LocalStore.read

    def failing(self: LocalStore, name: str) -> bytes:
        if name == record:
            raise OSError(5, "Input/output error")
        return read(self, name)

    monkeypatch.setattr(LocalStore, "read", failing)
    verdict = verify(str(cache), repair=True)
    assert [(f.kind, f.where) for f in verdict.findings] == [("unreadable", record)]
    assert whole(cache) == before


def test_repair_wants_the_cache_alone(cache: Path) -> None:
    code = (
        "import sys; from tec_cache.cache.lock import cache_lock; from tec_cache.store import open_store\n"
        "with cache_lock(open_store(sys.argv[1])) as lock: lock.share(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "held\n"
        with pytest.raises(TecCacheError, match="another job is writing"):
            verify(str(cache), repair=True)
        assert verify(str(cache)).clean, "looking alone disturbs nobody"
        writer.communicate()
    assert verify(str(cache), repair=True).clean


def test_full_looks_inside_what_has_a_right_checksum(cache: Path) -> None:
    """A record and payload that were both rewritten to fit each other's hash, but not each other's content."""
    opened = open_cache(cache)
    views, targets = opened.views_record(UNIT), opened["tiny"].record(UNIT)
    arrays = opened["tiny"].codec.arrays(opened["tiny"].spec)
    with (cache / tar_of(cache)).open("rb") as stream:
        assert tar_problem(stream, views, UNIT) == ""
        assert "other crops" in tar_problem(stream, views, SISTER)
        turned = ViewsRecord(**(views.values() | {"keys": views.keys[::-1]}))
        assert "other crops" in tar_problem(stream, turned, UNIT)
        assert "CRC" in tar_problem(stream, ViewsRecord(**(views.values() | {"crc32": views.crc32[::-1]})), UNIT)
        assert "labels" in tar_problem(stream, ViewsRecord(**(views.values() | {"labels": views.labels[::-1]})), UNIT)
    with (cache / zip_of(cache)).open("rb") as stream:
        assert zip_problem(stream, targets, arrays) == ""
        assert "shape" in zip_problem(stream, TargetRecord(**(targets.values() | {"count": 7})), arrays)
        name, blocks = next(iter(targets.blocks.items()))
        for place in range(3):
            wrong = [[value + (i == place) for i, value in enumerate(blocks[0])]]
            record = TargetRecord(**(targets.values() | {"blocks": targets.blocks | {name: wrong}}))
            assert "block 0" in zip_problem(stream, record, arrays)
        fewer = TargetRecord(**(targets.values() | {"blocks": {name: blocks}}))
        assert "not in the record" in zip_problem(stream, fewer, arrays)
    (finding,) = check_payload(open_store(cache), views.payload, "r", UNIT, lambda stream: "no good")
    assert (finding.what, finding.drop) == ("no good", ("r", tar_of(cache)))


def test_a_cache_behind_a_url(cache: Path, tmp_path: Path) -> None:
    remote, url = fsspec.filesystem("memory"), "memory://verify/cache"
    for name, data in whole(cache).items():
        remote.pipe_file(f"/verify/cache/{name}", data)
    try:
        assert verify(url, full=True).clean
        name = tar_of(cache)
        remote.pipe_file(f"/verify/cache/{name}", (cache / name).read_bytes()[::-1])
        verdict = verify(url, full=True, repair=True)
        assert [finding.where for finding in verdict.dropped] == [name]
        assert not remote.exists(f"/verify/cache/{name}")
    finally:
        remote.rm("/verify", recursive=True)


# the base


@pytest.mark.parametrize("quality", ["exact", "default"])
def test_the_base_says_what_is_stored(made: Callable[[str], Path], quality: str) -> None:
    verdict = verify(str(made(quality)), base=True, sample=20)
    assert verdict.clean
    (figures,) = verdict.base
    assert (figures["views"], figures["units"]) == (20, 6)
    for name in ("mse", "kl"):
        assert figures["measured"][name] == pytest.approx(figures["stated"][name], rel=0.5)
        assert figures["stated"][name] < figures["allowed"][name]
    assert figures["measured"]["rows_alike"] == 1.0
    assert figures["measured"]["cosine"] > 0.97
    assert verify(str(made(quality)), base=True, sample=3, seed=1).base[0]["units"] == 1


def test_bfloat16_targets_pass_in_float32(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "half", tiny_base, "exact", precision="bfloat16")
    verdict = verify(str(tmp_path / "half"), base=True)
    assert verdict.clean, verdict.findings
    assert verdict.base[0]["measured"]["mse"] > 1e-6, "the noise is really there"


@pytest.mark.parametrize(
    ("quality", "tensor", "factor"),
    [("exact", "blocks.0.attn.qkv.weight", 1.02), ("default", "blocks.0.attn.qkv.weight", 1.5),
     ("default", "patch_embed.proj.weight", 0.7), ("exact", "blocks.2.attn.qkv.bias", 1.2)],
)  # fmt: skip
def test_a_changed_weight_is_named_and_measured(
    made: Callable[[str], Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quality: str,
    tensor: str,
    factor: float,
) -> None:
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    state[tensor] = state[tensor] * factor
    save_file(state, other / "model.safetensors")
    weights = str(other / "model.safetensors")
    verdict = verify(str(made(quality)), base=True, base_weights=weights)
    assert [finding.kind for finding in verdict.findings] == ["base", "base"]
    assert "weights_sha256" in verdict.findings[0].what
    monkeypatch.setattr(pipelines.checking.base_check, "differences", lambda *_: [])
    verdict = verify(str(made(quality)), base=True, base_weights=weights)
    (finding,) = verdict.findings
    assert "not what the base says" in finding.what
    assert (finding.kind, finding.drop) == ("base", ())


def shuffle_rows(cache: Cache, unit: Unit, only: str = "") -> None:
    """Write a unit's targets anew with its rows (of one array) moved on by one, all checksums right.

    The index goes: it knows the bytes that were there before.
    """
    target, views = cache["tiny"], cache.views_record(unit)
    record = target.record(unit, views)
    assert record.payload is not None
    arrays = TargetArrays(record.count, target.codec.arrays(target.spec))
    stored = target.read_unit(record)
    arrays.add({name: np.roll(values, only in ("", name), axis=0) for name, values in stored.items()})
    for name in (*cache.store.names("index"), layout.target_record("tiny", unit), record.payload.name):
        cache.store.remove(name)
    commit_targets(cache.store, "tiny", unit, arrays, views, target.fingerprint, record.codec_sha256)


@pytest.mark.parametrize("quality", ["exact", "default"])
def test_rows_shuffled_within_a_unit_are_noticed(
    made: Callable[[str], Path], tmp_path: Path, photos: Path, tiny_base: Path, quality: str
) -> None:
    path = Path(shutil.copytree(made(quality), tmp_path / "cache"))
    before = whole(path)
    shuffle_rows(open_cache(path), UNIT)
    assert found(path) == [], "no checksum can say so"
    verdict = verify(str(path), base=True, sample=12)
    (finding,) = verdict.findings
    assert (finding.kind, finding.unit, finding.where) == ("targets", str(UNIT), zip_of(path))
    verify(str(path), base=True, sample=12, repair=True)
    run(photos, path, tiny_base, quality)
    assert whole(path) == before


@pytest.mark.parametrize("array", ["features", "attention", "rows"])
def test_each_array_alone_is_held_to_its_crop(made: Callable[[str], Path], tmp_path: Path, array: str) -> None:
    path = Path(shutil.copytree(made("exact"), tmp_path / "cache"))
    shuffle_rows(open_cache(path), UNIT, only=array)
    (finding,) = verify(str(path), base=True, sample=12).findings
    assert (finding.kind, finding.unit) == ("targets", str(UNIT))


def test_a_damaged_block_met_by_the_base_is_a_finding(cache: Path) -> None:
    """Quick looks at sizes only; what the sample reads is checked all the same."""
    record = open_cache(cache)["tiny"].record(UNIT)
    flip(cache / zip_of(cache), record.blocks["features"][0][0] + 5)
    (finding,) = verify(str(cache), base=True).findings
    assert (finding.kind, finding.where) == ("payload", zip_of(cache))


def test_a_base_that_has_moved(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "here"))
    run(photos, tmp_path / "cache", base, "exact", name="tiny")
    base.rename(tmp_path / "there")
    with pytest.raises(ConfigError, match="not where it was"):
        verify(str(tmp_path / "cache"), base=True)
    assert verify(str(tmp_path / "cache"), base=True, base_weights=str(tmp_path / "there")).clean


def test_a_named_base_is_run_for_the_sets_that_it_made(cache: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = write_tiny_base(tmp_path / "other", seed=1)
    extract(tiny_config(None, cache, other))
    verdict = verify(str(cache), base=str(other), sample=4)
    assert verdict.clean
    assert [(figures["target"], figures["base"], figures["views"]) for figures in verdict.base] == [
        ("other", str(other), 4)
    ]
    told = CliRunner().invoke(cli, ["verify", str(cache), "--base", str(tiny_base), "--sample", "4", "--json"])
    assert told.exit_code == 0
    assert [figures["target"] for figures in json.loads(told.stdout)["base"]] == ["tiny"]
    # a name that made none of them; with --target any base is held against that set
    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    with pytest.raises(ConfigError, match="no target set was made by") as error:
        verify(str(cache), base=str(moved))
    assert error.value.details == (f"other: made by {other}", f"tiny: made by {tiny_base}")
    assert verify(str(cache), base=str(moved), target="tiny", sample=4).clean
    verdict = verify(str(cache), base=str(other), target="tiny", sample=4)
    assert {(finding.kind, finding.where) for finding in verdict.findings} == {("base", "targets/tiny/target.json")}
    assert verdict.count("damage")


def test_rows_that_both_chose_are_compared_in_any_order() -> None:
    from tec_cache.codec.agreement import attention_agreement
    from tec_cache.types import Targets

    logits = torch.randn(1, 2, 5, 9, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[3, 1, 8, 5]])
    turned = [0, 4, 3, 2, 1]
    one = Targets(torch.zeros(1, 9, 4), logits, rows)
    two = Targets(torch.zeros(1, 9, 4), logits[:, :, turned] + 7, torch.tensor([[5, 8, 1, 0]]))
    kl, alike = attention_agreement(one, two)
    assert kl.item() == pytest.approx(0, abs=1e-6)
    assert alike.item() == 0.75
    wrong = Targets(one.features, logits, rows.flip(1))
    assert attention_agreement(one, wrong)[0].item() > 0.3


# the command


def test_the_command_says_it_in_words_and_in_json(cache: Path) -> None:
    fine = CliRunner().invoke(cli, ["verify", str(cache), "--full", "--quiet"])
    assert (fine.exit_code, "nothing is wrong" in fine.output) == (0, True)
    name = tar_of(cache)
    truncated(cache, name)
    for unit in open_cache(cache)["tiny"].units:
        (cache / layout.target_record("tiny", unit)).unlink()
    told = CliRunner().invoke(cli, ["verify", str(cache), "--quiet"])
    assert told.exit_code == 3
    assert "damage       1" in told.output
    assert f"missing      {len(open_cache(cache).view_units)}" in told.output
    result = CliRunner().invoke(cli, ["verify", str(cache), "--json", "--repair"])
    assert result.exit_code == 3
    values = json.loads(result.stdout)
    assert values["dropped"][0]["where"] == name
    assert values["next"] == [f"tec-cache extract PHOTOS --cache {cache} --views 2 --name tiny"]
    assert set(values["findings"][0]) == {"kind", "level", "where", "unit", "what", "todo"}


def test_a_long_list_is_cut(cache: Path) -> None:
    for number in range(30):
        foreign(cache, f"records/views/{number}.txt")
    told = CliRunner().invoke(cli, ["verify", str(cache), "--quiet"])
    assert told.output.count("unknown: ") == 20
    assert "... and 10 more (--json)" in told.output


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sample": 0, "base": True}, "--sample"),
        ({"target": "tiny"}, "--base"),
        ({"base": True, "target": "tinny"}, "tiny"),
    ],
)
def test_bad_usage(cache: Path, options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        verify(str(cache), **options)


def test_no_cache_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no cache"):
        verify(str(tmp_path / "nothing"), repair=True)
    assert not (tmp_path / "nothing").exists()
