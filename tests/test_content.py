"""Units are bound to their photos: what was made of other photos is never mixed in, whatever is copied from where."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

import pipelines.extraction.make_views
from pipelines.extract import extract
from pipelines.info import info
from pipelines.merge import merge
from pipelines.pack import pack
from pipelines.remove import remove
from pipelines.unpack import unpack
from pipelines.verify import verify
from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.record import ViewsRecord, hash_photos
from tec_cache.cache.sealed import FORMAT
from tec_cache.data.passed_over import PassedOver
from tec_cache.data.photos import Photo
from tec_cache.data.tars import TarShard
from tec_cache.errors import CacheError, ConfigError, IdentityError, SourceError
from tests.conftest import encoded, files_below, load_everything, photo, tiny_config, write_tar
from tests.sealing import reseal, unsealed

COUNTS = [6, 5]
"""Photos of each shard: two groups of at most four."""


@pytest.fixture(autouse=True)
def _only_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let shards be known by their names alone, as if their first and last bytes and sizes were always the same."""
    monkeypatch.setattr(TarShard, "identity", lambda shard: {"name": shard.name})


def write_photos(folder: Path, start: int, *, labels: int = 0, only: Iterable[int] = ()) -> Path:
    """Write shards of photos whose names, sizes and labels do not tell what they show.

    start: the first picture. labels: added to each label. only: places that are written so; the others start at 0.
    """
    chosen, place = set(only), 0
    for shard, count in enumerate(COUNTS):
        members = []
        for number in range(count):
            other = not chosen or place in chosen
            picture = encoded(photo(number + 100 * shard + (start if other else 0)), "BMP")
            label = str((number + (labels if other else 0)) % 8).encode()
            members += [(f"p{number}.bmp", picture), (f"p{number}.cls", label)]
            place += 1
        write_tar(folder / f"shard-{shard}.tar", members)
    return folder


def settings(photos: Path, cache: Path, base: Path | None, **changes: object):  # type: ignore[no-untyped-def]
    return tiny_config(photos, cache, base, **({"group_size": 4} | changes))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Two caches, `one` and `two`, of the photos in `one-photos` and `two-photos`: alike but for their pixels."""
    folder = tmp_path_factory.mktemp("twins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TarShard, "identity", lambda shard: {"name": shard.name})
        for name, start in (("one", 0), ("two", 1000)):
            photos = write_photos(folder / f"{name}-photos", start)
            extract(settings(photos, folder / name, tiny_base))
    one, two = open_cache(folder / "one"), open_cache(folder / "two")
    assert (one.fingerprint, one["tiny"].fingerprint) == (two.fingerprint, two["tiny"].fingerprint)
    return folder


def parts_of(cache: Path, what: str, units: list[Unit]) -> list[str]:
    """Name the files of some units: records and payloads."""
    opened, names = open_cache(cache), []
    for unit in units:
        if what == "views":
            names += [layout.views_record(unit), opened.views_record(unit).payload.name]  # type: ignore[union-attr]
        elif what == "targets":
            record = opened["tiny"].record(unit)
            names += [layout.target_record("tiny", unit), record.payload.name]  # type: ignore[union-attr]
    return names + sorted({layout.source_record(unit.shard) for unit in units if what == "source"})


def mixed(twins: Path, out: Path, whats: Iterable[str], units: list[Unit]) -> Path:
    """Copy `one`, with some parts of `two` in the place of its own."""
    shutil.copytree(twins / "one", out)
    for what in whats:
        for name in parts_of(twins / "one", what, units):
            (out / name).unlink()
        for name in parts_of(twins / "two", what, units):
            shutil.copy(twins / "two" / name, out / name)
    return out


def require_bad(cache: Path) -> None:
    """Both audits find damage, and training refuses."""
    for full in (False, True):
        assert verify(str(cache), full=full).count("damage"), full
    with pytest.raises(CacheError) as error:
        load_everything(cache)
    assert error.value.exit_code == 3
    assert error.value.where


WHATS = [c for n in (1, 2, 3) for c in itertools.combinations(("views", "targets", "source"), n)]
SHARD = [Unit(1, group, view) for group in range(2) for view in range(2)]
AMOUNTS = {"a unit": [Unit(1, 0, 1)], "a group": [Unit(1, 0, 0), Unit(1, 0, 1)], "a shard": SHARD}


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("whats", WHATS, ids="+".join)
def test_files_of_a_cache_of_other_photos_are_found_refused_and_mended(
    twins: Path, tiny_base: Path, tmp_path: Path, whats: tuple[str, ...], amount: str
) -> None:
    cache = mixed(twins, tmp_path / "cache", whats, AMOUNTS[amount])
    require_bad(cache)
    verify(str(cache), full=True, repair=True)
    extract(settings(twins / "one-photos", cache, tiny_base))
    assert files_below(cache) == files_below(twins / "one")


def test_all_units_and_source_records_of_another_cache_are_found(twins: Path, tmp_path: Path) -> None:
    """One file alone is at odds with all others then: repairing must not cost the whole cache."""
    everything = [Unit(0, *unit[1:]) for unit in SHARD] + SHARD
    cache = mixed(twins, tmp_path / "cache", ("views", "targets", "source"), everything)
    require_bad(cache)
    damage = [f for f in verify(str(cache), full=True).findings if f.level == "damage"]
    assert [f.where for f in damage] == [layout.CONTENT_RECORD]
    assert not damage[0].drop


def test_parts_made_of_other_photos_are_not_merged(twins: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"source shard shard-0\.tar"):
        merge(str(tmp_path / "out"), [str(twins / "one"), str(twins / "two")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(
    ("change", "group"),
    [
        ({"start": 1000}, 0),
        ({"start": 1000, "only": [4]}, 1),
        ({"start": 0, "labels": 3, "only": [0]}, 0),
    ],
    ids=["all pixels", "one photo", "a label"],
)
@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_source_exchanged_between_two_runs_is_refused_by_shard_and_group(
    twins: Path, tiny_base: Path, tmp_path: Path, on_error: str, change: dict, group: int, end: str
) -> None:
    """More views of a finished cache; or the rest of one whose extraction was killed within the first shard."""
    cache = Path(shutil.copytree(twins / "one", tmp_path / "cache"))
    if end == "killed":
        for name in files_below(cache):
            later = layout.unit_of(name) is not None and layout.unit_of(name) > Unit(0, 1, 0)  # type: ignore[operator]
            if later or name.startswith("records/source") or name == layout.CONTENT_RECORD:
                (cache / name).unlink()
    before = files_below(cache)
    photos = write_photos(tmp_path / "photos", **change)
    num_views = 3 if end == "finished" else 2
    with pytest.raises(SourceError, match=rf"group {group} of shard shard-0\.tar now holds other photos") as error:
        extract(settings(photos, cache, tiny_base, views=num_views, on_error=on_error))
    assert "restore the shard" in error.value.todo
    assert error.value.where.endswith("shard-0.tar")
    after = files_below(cache)
    assert {name: after[name] for name in before} == before
    new = [name for name in set(after) - set(before) if layout.unit_of(name)]
    assert all(layout.unit_of(name).group < group for name in new), "what was made is of photos that are the same"
    extract(settings(twins / "one-photos", cache, tiny_base, views=num_views))
    load_everything(cache)


def test_skipped_photos_count_as_well(tmp_path: Path) -> None:
    """A broken photo that was exchanged for another broken one: the group is another one."""
    for name, data in (("a", b"no picture"), ("b", b"none too..")):
        members = [("p0.jpg", encoded(photo(0))), ("p1.jpg", data)]
        write_tar(tmp_path / name / "shard-0.tar", members)
    extract(settings(tmp_path / "a", tmp_path / "c", None, views_only=True, on_error="skip"))
    with pytest.raises(SourceError, match="group 0"):
        extract(settings(tmp_path / "b", tmp_path / "c", None, views_only=True, on_error="skip", views=3))


def test_the_hash_of_a_group_is_that_of_its_photos(twins: Path) -> None:
    cache = open_cache(twins / "one")
    pictures = [encoded(photo(number), "BMP") for number in range(4, 6)]
    wanted = hash_photos((f"p{n}", n, hashlib.sha256(p).digest()) for n, p in enumerate(pictures, 4))
    assert cache.source_records[0].group_sha256[1] == wanted
    assert {cache.views_record(Unit(0, 1, view)).photos_sha256 for view in range(2)} == {wanted}
    assert hash_photos([("ab", None, b"c")]) != hash_photos([("a", None, b"bc")])
    assert hash_photos([("a", 1, b"2")]) != hash_photos([("a", 12, b"")])


@pytest.mark.parametrize("part", ["photos", "labels"])
def test_views_of_a_group_agree_with_each_other(twins: Path, tmp_path: Path, part: str) -> None:
    """Where the source record is not there yet, too."""
    cache = Path(shutil.copytree(twins / "one", tmp_path / "cache"))
    for name in (layout.source_record(1), layout.CONTENT_RECORD):
        (cache / name).unlink()
    path = cache / layout.views_record(Unit(1, 0, 1))
    body = unsealed(path)
    change = {"photos_sha256": "5a" * 32} if part == "photos" else {"labels": [7, *body["labels"][1:]]}
    reseal(path, body | change)
    damage = [f for f in verify(str(cache)).findings if f.level == "damage"]
    assert [f.unit for f in damage] == [str(Unit(1, 0, 1))] * 2, "the targets over it go with it"
    assert damage[0].where == layout.views_record(Unit(1, 0, 1))
    assert "another view of the group" in damage[0].what


def test_the_last_views_that_are_lost_are_missed(twins: Path, tiny_base: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(twins / "one", tmp_path / "cache"))
    for name in files_below(cache):
        if "-v01" in name:
            (cache / name).unlink()
    found = info(str(cache))
    assert (found["num_views"], found["missing_units"], found["targets"]["tiny"]["missing_units"]) == (2, 4, 4)
    assert verify(str(cache)).count("missing") == 4
    with pytest.raises(CacheError, match="units are missing, 4"):
        load_everything(cache)
    extract(settings(twins / "one-photos", cache, tiny_base, views=None))
    assert files_below(cache) == files_below(twins / "one")


@pytest.mark.parametrize("lost", [layout.asked_record(0), layout.asked_record(1), layout.CONTENT_RECORD])
def test_a_lost_record_of_what_was_asked_or_read_is_missed(
    twins: Path, tiny_base: Path, tmp_path: Path, lost: str
) -> None:
    cache = Path(shutil.copytree(twins / "one", tmp_path / "cache"))
    (cache / lost).unlink()
    assert [f.where for f in verify(str(cache)).findings if f.level == "missing"] == [lost]
    if lost == layout.CONTENT_RECORD:
        with pytest.raises(CacheError, match="what all photos were"):
            load_everything(cache)
    extract(settings(twins / "one-photos", cache, tiny_base, views=None))
    assert files_below(cache) == files_below(twins / "one")


def test_views_are_asked_for_before_the_first_unit(
    twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the first unit; a smaller number is not believed afterwards, and other settings are no clash."""

    def killed(*_args: object, **_options: object) -> ViewsRecord:
        raise KeyboardInterrupt

    config = settings(twins / "one-photos", tmp_path / "c", None, views_only=True, views=3)
    with monkeypatch.context() as patch:
        patch.setattr(pipelines.extraction.make_views, "commit_views", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(config)
    assert open_cache(tmp_path / "c").num_views == 3
    extract(settings(twins / "one-photos", tmp_path / "c", None, views_only=True, seed=5, views=1))
    assert open_cache(tmp_path / "c").num_views == 1, "nothing was committed: what was asked bound nobody"
    assert verify(str(tmp_path / "c")).clean


def test_growing_shrinking_merging_packing_and_unpacking_keep_count(
    twins: Path, tiny_base: Path, tmp_path: Path
) -> None:
    photos, grown = twins / "one-photos", Path(shutil.copytree(twins / "one", tmp_path / "grown"))
    extract(settings(photos, grown, tiny_base, views=3))
    extract(settings(photos, tmp_path / "fresh", tiny_base, views=3))
    alike = [{n: d for n, d in files_below(path).items() if not n.endswith("codec.json")}  # its errors are measured
             for path in (grown, tmp_path / "fresh")]  # fmt: skip
    assert alike[0] == alike[1], "views that were added later are the same"
    merge(str(tmp_path / "merged"), [str(twins / "one"), str(grown)])
    assert files_below(tmp_path / "merged") == files_below(grown)
    pack(str(grown), str(tmp_path / "pack"))
    assert open_cache(tmp_path / "pack").num_views == 3
    unpack(str(tmp_path / "pack"), str(tmp_path / "unpacked"))
    assert files_below(tmp_path / "unpacked") == files_below(grown)
    remove(str(grown), views=2)
    assert files_below(grown) == files_below(twins / "one")
    for path in ("merged", "unpacked", "grown"):
        assert verify(str(tmp_path / path), full=True).clean


def test_notes_are_kept_and_counted(twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What of a photo was not understood and not needed is no reason to refuse it, nor to forget it."""
    real = TarShard.photos

    def noted(shard: TarShard, passed_over: PassedOver | None = None):  # type: ignore[no-untyped-def]
        for whole in real(shard, passed_over):
            odd = whole.key in ("p1", "p4")
            yield Photo(whole.key, whole.data, None, note="its label is a poem") if odd else whole

    monkeypatch.setattr(TarShard, "photos", noted)
    summary = extract(settings(twins / "one-photos", tmp_path / "c", None, views_only=True))
    assert summary.notes == [[f"shard-{i}.tar", key, "its label is a poem"] for i in range(2) for key in ("p1", "p4")]
    assert (summary.photos, summary.skipped) == (11, [])
    assert info(str(tmp_path / "c"))["noted_photos"] == 4
    record = open_cache(tmp_path / "c").views_record(Unit(0, 0, 1))
    assert (record.notes, record.labels) == ([["p1", "its label is a poem"]], [0, None, 2, 3])
    pack(str(tmp_path / "c"), str(tmp_path / "p"))
    unpack(str(tmp_path / "p"), str(tmp_path / "back"))
    assert files_below(tmp_path / "back") == files_below(tmp_path / "c")


GOLDEN = Path(__file__).parent / "data" / "golden_cache_v1" / "cache"

WRITERS = {
    "extract": lambda old, photos, base: extract(settings(photos, old, None, views_only=True)),
    "targets": lambda old, photos, base: extract(tiny_config(None, old, base)),
    "fit": lambda old, photos, base: extract(settings(photos, old, base), fit_only=True),
    "merge from": lambda old, photos, base: merge(str(old.parent / "out"), [str(old)]),
    "merge into": lambda old, photos, base: merge(str(old), [str(old.parent / "copy")]),
    "pack": lambda old, photos, base: pack(str(old), str(old.parent / "out")),
    "repair": lambda old, photos, base: verify(str(old), repair=True),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_cache_of_version_1_is_read_and_never_added_to(
    twins: Path, tiny_base: Path, tmp_path: Path, writer: str
) -> None:
    old = Path(shutil.copytree(GOLDEN, tmp_path / "old"))
    shutil.copytree(GOLDEN, tmp_path / "copy")
    with pytest.raises(ConfigError, match="format version 1, which is read only") as error:
        WRITERS[writer](old, twins / "one-photos", tiny_base)
    assert "into another" in error.value.todo
    assert {n: d for n, d in files_below(old).items() if n != ".lock"} == files_below(GOLDEN)
    assert not [name for name in files_below(tmp_path) if name.startswith("out/")]


def test_a_cache_of_version_1_may_be_replaced(twins: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(GOLDEN, tmp_path / "old"))
    extract(settings(twins / "one-photos", old, None, views_only=True), overwrite=True)
    assert json.loads((old / "cache.json").read_bytes())["format"] == FORMAT
    assert open_cache(old).index is not None
    assert not [name for name in files_below(old) if layout.file_of(name) is None and name != ".lock"]
    assert verify(str(old), full=True).clean


@pytest.mark.parametrize("name", ["records/views/000000/000000.000-v01.json", "records/source/000000.json"])
def test_a_record_of_version_1_is_none_of_this_version(twins: Path, tmp_path: Path, name: str) -> None:
    cache = Path(shutil.copytree(twins / "one", tmp_path / "cache"))
    shutil.rmtree(cache / "index")  # with a whole one no record is read
    body = unsealed(cache / name)
    for field in ("photos_sha256", "notes", "group_sha256"):
        body.pop(field, None)
    reseal(cache / name, body)
    require_bad(cache)
