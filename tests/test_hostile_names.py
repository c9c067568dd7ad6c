"""Caches and packs made to do harm: whatever they name, nothing outside the given folders is touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.extract import extract
from pipelines.extraction.extract_summary import require_finished
from pipelines.info import info
from pipelines.merge import merge
from pipelines.pack import pack
from pipelines.remove import remove
from pipelines.train import train
from pipelines.unpack import unpack
from pipelines.verify import verify
from tec_cache.cache import layout
from tec_cache.cache.copy import copy_payload, require_name
from tec_cache.cache.identity import fingerprint
from tec_cache.cache.layout import Unit, file_of
from tec_cache.cache.opening import open_cache
from tec_cache.cache.record import Payload
from tec_cache.errors import CacheError, ConfigError, TecCacheError
from tec_cache.store import Store, open_store
from tec_cache.store.files import hash_file
from tec_cache.store.names import checked_name
from tec_cache.store.staged import StagedStore
from tests.conftest import tiny_config, tiny_training
from tests.sealing import reseal, unsealed

UNIT = Unit(0, 0, 0)
SHA = "0" * 64

LEADING_OUT = ["../x", "../../x", "views/../../x", "targets/tiny/../../../x", "/x", "//x", "..", ".", "", "views/",
               "views//x", "./x", "views\\..\\..\\x", "..\\x", "C:/x", "C:x", "a\0b", "views/a\nb", "\x1b[2Jx",
               "x" * 256, "/".join(["x" * 200] * 6), "\ud800"]  # fmt: skip


def tree(folder: Path, *without: Path) -> dict[str, tuple[str, bytes]]:
    """Everything below a folder: kind and content of each file, link and folder."""
    found = {}
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(path, name) not in without]
        for name in (*folders, *files):
            place = Path(path, name)
            link = place.is_symlink()
            content = os.readlink(place).encode() if link else b"" if place.is_dir() else place.read_bytes()
            found[str(place)] = ("link" if link else "folder" if place.is_dir() else "file", content)
    return found


def code_of(command: Callable[[], Any]) -> int:
    """The exit code of a command: anything but a TecCacheError fails the test."""
    try:
        result = command()
    except TecCacheError as error:
        return error.exit_code
    return 3 if getattr(result, "clean", True) is False else 0


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a sealed document, and seal it as its author would."""
    body = unsealed(path)
    change(body)
    if "fingerprint" in body:
        body["fingerprint"] = fingerprint(body["identity"])
    reseal(path, body)


@pytest.mark.parametrize("name", LEADING_OUT)
@pytest.mark.parametrize("kind", ["local", "memory", "staged"])
def test_every_method_of_every_store_refuses_names_that_lead_out(tmp_path: Path, kind: str, name: str) -> None:
    inside, draft = tmp_path / "in" / "cache", tmp_path / "draft"
    inside.mkdir(parents=True)
    draft.write_bytes(b"draft")
    (tmp_path / "in" / "x").write_bytes(b"victim")
    store: Store = open_store("memory://names/cache" if kind == "memory" else inside)
    if kind == "staged":
        store = StagedStore(store, tmp_path / "stage")
    before = tree(tmp_path)
    uses: list[Callable[[], Any]] = [
        lambda: store.size(name),
        lambda: store.read(name),
        lambda: store.read_ranges(name, [(0, 1)]),
        lambda: store.put(draft, name),
        lambda: store.create(name, b"new"),
        lambda: store.remove(name),
    ]
    if name:  # the folder "" is the root
        uses.append(lambda: store.names(name))
    for use in uses[: 6 if kind != "local" else None]:
        with pytest.raises(CacheError, match="cannot be a file of a cache"):
            use()
    assert tree(tmp_path) == before


@given(st.text(st.sampled_from("ab./\\: \0\n"), max_size=12) | st.text(max_size=20))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_a_name_that_passes_stays_below_the_root(name: str) -> None:
    try:
        checked_name(name, "root")
    except CacheError:
        return
    whole = os.path.normpath(f"/somewhere/{name}")
    assert whole == f"/somewhere/{name}"
    assert whole.startswith("/somewhere/")


@given(st.text(st.sampled_from("targetsviewsrecords01.-/v"), max_size=40) | st.sampled_from(LEADING_OUT))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_what_the_layout_knows_is_a_name_of_the_store(name: str) -> None:
    if file_of(name) is not None:
        assert checked_name(name, "root") == name


def test_the_layout_knows_the_names_that_it_makes_and_their_neighbours_not() -> None:
    unit = Unit(123, 2, 3)
    names = {
        layout.MANIFEST: "manifest", layout.PACK: "pack", layout.target_manifest("a.b"): "target",
        layout.codec_record("a.b"): "codec", layout.codec_payload("a", SHA): "parameters",
        layout.views_payload(unit, SHA): "views tar", layout.target_payload("a", unit, SHA): "targets zip",
        layout.pack_payload(unit, SHA): "packed tar", layout.source_record(7): "source",
        layout.source_record(123_456_789): "source", layout.asked_record(0): "asked", layout.CONTENT_RECORD: "content",
        layout.views_record(unit): "views", layout.target_record("a", unit): "targets",
        layout.pack_record(unit): "packed", layout.views_record(Unit(1_234_567, 1234, 123)): "views",
    }  # fmt: skip
    for name, kind in names.items():
        file = file_of(name)
        assert file is not None, name
        assert file.kind == kind, name
        for other in (f"{name}.bak", f"x{name}", f"x/{name}", f"{name}/x", name.upper(), f"{name} ", f"{name}\n",
                      name.replace(".json", ".jsn"), f".{name}", name.replace("000", "0000", 1)):  # fmt: skip
            assert other == name or file_of(other) is None, other


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../x", ".hidden", "-x", "a b", "x" * 101, "a\n", "ä", "a\\b"])
def test_names_of_target_sets_are_refused_by_every_command(
    pair: Path, five: Path, tiny_base: Path, tmp_path: Path, name: str
) -> None:
    cache = shutil.copytree(pair / "cache", tmp_path / "cache")
    before = tree(tmp_path)
    commands: list[Callable[[], Any]] = [
        lambda: remove(str(cache), target=name),
        lambda: pack(str(cache), str(tmp_path / "out"), targets=[name or "."]),
        lambda: train(tiny_training(cache, tmp_path / "run", target=name or "."), dry_run=True),
        lambda: verify(str(cache), base=True, target=name or ".", base_weights=None),
    ]
    if name:
        commands.append(lambda: extract(tiny_config(five, cache, tiny_base, name=name), dry_run=True))
    for command in commands:
        assert code_of(command) == 2
    for make in (layout.target_manifest, layout.codec_record, layout.target_records):
        with pytest.raises(ConfigError, match="cannot name a target set"):
            make(name)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("sha256", ["", "../../../../x", "0" * 63, "A" * 64, "0" * 64 + "\n", "/" * 64])
def test_a_hash_that_is_none_makes_no_name(sha256: str) -> None:
    makers: list[Callable[[], str]] = [
        lambda: layout.views_payload(UNIT, sha256),
        lambda: layout.pack_payload(UNIT, sha256),
        lambda: layout.target_payload("tiny", UNIT, sha256),
        lambda: layout.codec_payload("tiny", sha256),
    ]
    for make in makers:
        with pytest.raises(CacheError, match="no SHA-256"):
            make()


def hostile_names(folder: Path) -> list[str]:
    """Names for a payload: beyond the cache, of other files of it, of another unit."""
    cache = folder / "cache"
    tars = [path.relative_to(cache).as_posix() for path in cache.glob("views/*/*.tar")]
    other = next(name for name in tars if str(UNIT) not in name)
    return ["../victim.tar", "../../victim.tar", "/victim.tar", "targets/../../victim.tar", "cache.json",
            layout.views_record(UNIT), "targets/tiny/target.json", other, "views\\..\\..\\victim.tar",
            f"views/{UNIT.folder}/{UNIT}.{'0' * 16}.tar", "views/notes.tar", ".lock", "x" * 3000]  # fmt: skip


RECORDS = {
    "views": layout.views_record(UNIT),
    "targets": layout.target_record("tiny", UNIT),
    "codec": layout.codec_record("tiny"),
}


@pytest.mark.parametrize("number", range(13))
@pytest.mark.parametrize("kind", RECORDS)
def test_a_payload_is_never_copied_or_removed_by_what_a_record_names(
    pair: Path, tmp_path: Path, kind: str, number: int
) -> None:
    name = hostile_names(pair)[number]
    part = shutil.copytree(pair / "cache", tmp_path / "in" / "part")
    # what the record names is there, and is what the record says
    real = open_store(part)
    body = unsealed(part / RECORDS[kind])
    victim = tmp_path / "in" / "victim.tar"
    victim.write_bytes(real.read(body["payload"]["name"]))
    shutil.copy(victim, tmp_path / "victim.tar")

    def point(body: dict[str, Any]) -> None:
        body["payload"] |= {"name": name, "size": victim.stat().st_size, "sha256": hash_file(victim)}

    rewrite(part / RECORDS[kind], point)
    before, out = tree(tmp_path), tmp_path / "in" / "out"
    merged = code_of(lambda: merge(str(out), [str(part)]))
    packed = code_of(lambda: pack(str(part), str(tmp_path / "in" / "packed")))
    assert {merged, packed} == {3}
    assert code_of(lambda: verify(str(part), full=True)) == 3
    assert tree(tmp_path, out, tmp_path / "in" / "packed", part) == {
        place: content for place, content in before.items() if not place.startswith(f"{part}{os.sep}")
        and place != str(part)
    }  # fmt: skip
    assert {p: c for p, c in tree(part).items() if not p.endswith(".lock")} == {
        p: c for p, c in before.items() if p.startswith(f"{part}{os.sep}") and not p.endswith(".lock")
    }, "who reads changes nothing"
    code_of(lambda: verify(str(part), full=True, repair=True))
    code_of(lambda: remove(str(part), views=1))
    code_of(lambda: remove(str(part), target="tiny"))
    left = tree(tmp_path, out, tmp_path / "in" / "packed", part)
    assert left == {p: c for p, c in before.items() if not p.startswith(str(part))}
    assert (part / "cache.json").exists()


def test_copying_goes_by_the_layouts_name_whatever_was_read(pair: Path, tmp_path: Path) -> None:
    cache = open_cache(pair / "cache")
    payload = cache.views_record(UNIT).payload
    assert payload is not None
    out = open_store(tmp_path / "out")
    for name in ("../x", "x", "views/x.tar"):
        with pytest.raises(CacheError, match="it names"):
            copy_payload(cache.store, out, Payload(name, payload.size, payload.sha256), payload.name)
        with pytest.raises(CacheError, match="it names"):
            require_name(payload, name, "here")
    assert not (tmp_path / "out").exists()
    copy_payload(cache.store, out, payload, payload.name)
    assert out.read(payload.name) == cache.store.read(payload.name)


@pytest.mark.parametrize("name", ["../victim.tar", "/victim.tar", "cache.json", "pack.json", "views/x.tar", "x.tar"])
def test_a_pack_unpacks_only_its_own_files(pair: Path, tmp_path: Path, name: str) -> None:
    packed = shutil.copytree(pair / "pack", tmp_path / "in" / "pack")
    record = packed / layout.pack_record(UNIT)
    real = packed / unsealed(record)["payload"]["name"]
    shutil.copy(real, tmp_path / "in" / "victim.tar")
    rewrite(record, lambda body: body["payload"].update(name=name))
    before, out = tree(tmp_path), tmp_path / "in" / "out"
    assert code_of(lambda: unpack(str(packed), str(out))) == 3
    assert tree(tmp_path, out) == before
    shutil.rmtree(packed / "index")  # with a whole one no record is read
    assert code_of(lambda: info(str(packed))) == 3


@pytest.mark.parametrize("name", ["..", "../../x", "a/b", "/x", "x" * 200])
@pytest.mark.parametrize("where", ["pack.json", "record"])
def test_a_pack_names_no_target_set_that_is_none(pair: Path, tmp_path: Path, name: str, where: str) -> None:
    packed = shutil.copytree(pair / "pack", tmp_path / "in" / "pack")
    shutil.rmtree(packed / "index")  # with a whole one info reads no record

    def rename(sets: dict[str, Any]) -> None:
        sets[name] = sets.pop("tiny")

    if where == "pack.json":
        rewrite(packed / "pack.json", lambda body: rename(body["identity"]["targets"]))
    else:
        rewrite(packed / layout.pack_record(UNIT), lambda body: rename(body["targets"]))
    before, out = tree(tmp_path), tmp_path / "in" / "out"
    for command in (lambda: unpack(str(packed), str(out)), lambda: info(str(packed)),
                    lambda: train(tiny_training(packed, tmp_path / "run"), dry_run=True)):  # fmt: skip
        assert code_of(command) in (2, 3)
    assert tree(tmp_path, out) == before


LINKS = ["views", "targets", "targets/tiny", "records", "records/views", "records/targets", "records/targets/tiny",
         "views/000000", "targets/tiny/000000", "records/views/000000", "records/targets/tiny/000000", "index",
         "index/targets"]  # fmt: skip


@pytest.mark.parametrize("link", LINKS)
def test_nothing_is_written_or_removed_through_a_link_that_leads_out(
    pair: Path, five: Path, tiny_base: Path, tmp_path: Path, link: str
) -> None:
    """The folder behind the link is somebody else's cache: full of names that would be removed."""
    (tmp_path / "in").mkdir()
    theirs = shutil.copytree(pair / "cache", tmp_path / "theirs")
    cache = shutil.copytree(pair / "cache", tmp_path / "in" / "cache")
    shutil.rmtree(cache / link)
    (cache / link).symlink_to(theirs / link, target_is_directory=True)
    (theirs / layout.views_payload(UNIT, "0" * 64)).write_bytes(b"a leftover of theirs")
    (theirs / layout.views_record(Unit(0, 0, 1))).write_bytes(b"a damaged record of theirs")
    before = tree(tmp_path, cache)
    for command in (
        lambda: verify(str(cache), full=True, repair=True),
        lambda: remove(str(cache), views=1),
        lambda: remove(str(cache), target="tiny"),
        lambda: merge(str(cache), [str(pair / "cache")]),
        lambda: extract(tiny_config(five, cache, tiny_base, quality="default", views=3)),
        lambda: extract(tiny_config(five, cache, tiny_base, quality="exact"), overwrite=True),
        lambda: extract(tiny_config(five, cache, tiny_base, seed=5), overwrite=True),
    ):
        assert code_of(command) in (0, 3)
        assert tree(tmp_path, cache) == before
    # a linked folder of one shard is not listed: as on the command line, what is not there afterwards is an error
    again = tiny_config(five, cache, tiny_base, seed=5)
    assert code_of(lambda: require_finished(extract(again, overwrite=True))) == 3


@pytest.mark.parametrize("link", ["views", "targets", "records", ".drafts", ".lock"])
def test_no_new_file_comes_to_be_behind_a_link(pair: Path, tmp_path: Path, link: str) -> None:
    for name, command in (("merged", lambda out: merge(out, [str(pair / "cache")])),
                          ("unpacked", lambda out: unpack(str(pair / "pack"), out)),
                          ("packed", lambda out: pack(str(pair / "cache"), out))):  # fmt: skip
        outside, out = tmp_path / f"{name}-outside", tmp_path / name
        outside.mkdir()
        out.mkdir()
        # a lock that is not there yet would be made by whoever opens it
        (out / link).symlink_to(outside / "new" if link == ".lock" else outside)
        done = code_of(lambda out=out, command=command: command(str(out)))
        assert list(outside.iterdir()) == []
        assert done in ((1, 2, 3) if not (name == "packed" and link == "views") else (0,))


def test_links_within_a_cache_are_followed_and_a_linked_file_is_replaced_not_its_target(
    pair: Path, five: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(pair / "cache", tmp_path / "cache")
    shutil.move(cache / "views", cache / "more")
    (cache / "views").symlink_to("more")
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    payload = open_cache(cache).views_record(UNIT).payload
    assert payload is not None
    (cache / payload.name).unlink()
    (cache / payload.name).symlink_to(victim)
    assert code_of(lambda: verify(str(cache), full=True, repair=True)) == 3
    extract(tiny_config(five, cache, tiny_base, quality="default"))
    assert victim.read_bytes() == b"mine"
    assert verify(str(cache), full=True).clean
