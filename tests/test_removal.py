"""What is removed is what this program wrote, by its exact name: every other byte stays, whatever it is called."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.extract import extract
from pipelines.merge import merge
from pipelines.pack import pack
from pipelines.plan import plan
from pipelines.remove import remove
from pipelines.terminal.texts import extract_text
from pipelines.unpack import unpack
from pipelines.verify import verify
from tec_cache.cache.layout import Unit, file_of
from tec_cache.cache.opening import open_cache
from tec_cache.cache.remove import clear_leftovers, remove_all, remove_target_set
from tec_cache.config import PlanConfig
from tec_cache.errors import CacheError, ConfigError
from tec_cache.store import open_store
from tec_cache.store.staged import StagedStore
from tests.conftest import files_below, tiny_config, tiny_training

UNIT = Unit(0, 0, 0)
FOLDER = UNIT.folder
HASH = "0123456789abcdef"

THEIRS = ["index/views.idx.bak", "index/notes.idx", "index/tiny.idx", "index/targets/tiny.idx.1", "notes.txt",
          "cache.json.bak", "cache.json~", "views.tar", "records/README", "records/notes.json",
          "records/content.json.old", "records/views/notes.txt", "records/views/notes.json", "records/views/.keep",
          f"records/views/{UNIT}.json.bak", f"records/views/0{UNIT}.json", f"records/views/old/{UNIT}.json",
          f"records/views/{UNIT}.json", f"records/views/000001/{UNIT}.json", f"records/views/{FOLDER}/{UNIT}.json.bak",
          f"records/views/{FOLDER}/0{UNIT}.json", f"records/views/{FOLDER}/old/{UNIT}.json",
          f"records/{UNIT}.json", "records/source/notes.json", "records/source/0.json", "records/asked/notes.json",
          "records/asked/0.json", "records/targets/notes.json", "records/targets/tiny/notes.txt",
          f"records/targets/tiny/{UNIT} (copy).json", f"records/targets/tiny/old/{UNIT}.json",
          f"records/mine/{UNIT}.json", f"records/packed/{UNIT}.txt", "views/README.md", f"views/{UNIT}.tar",
          f"views/{UNIT}.{HASH}.zip", f"views/{UNIT}.{HASH}.tar.part", f"views/{UNIT}.{HASH.upper()}.tar",
          f"views/old/{UNIT}.{HASH}.tar", f"views/{UNIT}.{HASH}.tar", f"views/000001/{UNIT}.{HASH}.tar",
          f"views/{FOLDER}/{UNIT}.{HASH}.zip", f"views/{FOLDER}/{UNIT}.tar", f"views/{FOLDER}/old/{UNIT}.{HASH}.tar",
          f"targets/tiny/{UNIT}.{HASH}.zip", f"targets/tiny/{FOLDER}/{UNIT}.zip", f"samples/{UNIT}.{HASH}.tar",
          "targets/README", "targets/tiny/target.json.bak", "targets/tiny/target.jsonl",
          "targets/tiny/codec.notes.txt", "targets/tiny/codec.json~", "targets/tiny/codec.safetensors",
          f"targets/tiny/codec.{HASH[:-1]}.safetensors", f"targets/tiny/codec.{HASH}.bin", f"targets/tiny/{UNIT}.zip",
          f"targets/tiny/{UNIT}.{HASH}.tar", f"targets/tiny/old/{UNIT}.{HASH}.zip", "targets/tiny/old/target.json",
          "targets/mine/plan.txt", "targets/my set/target.json", f"targets/my set/{UNIT}.{HASH}.zip",
          "targets/mine/codec.json", f"targets/mine/codec.{HASH}.safetensors", f"{UNIT}.{HASH}.tar", f"{UNIT}.tar",
          ".drafts/notes.txt", ".drafts/.hidden.tmp", ".drafts/0123", ".drafts/work/plan.txt", ".git/config",
          ".drafts/.tec-cache-plan-notes/x"]  # fmt: skip


def neighbours(cache: Path, seed: int, count: int) -> list[str]:
    """Names next to those of the files that are there: one letter more, less, or another."""
    rng, names = random.Random(seed), sorted(files_below(cache))
    found: set[str] = set()
    while len(found) < count:
        folder, _, last = rng.choice(names).rpartition("/")
        place = rng.randrange(len(last))
        last = rng.choice([
            last[:place] + last[place + 1 :], last[:place] + rng.choice("0aZ-_ ~é") + last[place:], last + ".1",
            "x" + last, last.upper(), last.replace(".", "..", 1),
        ])  # fmt: skip
        name = f"{folder}/{last}".lstrip("/")
        if last and file_of(name) is None and not (cache / name).exists() and last != ".lock":
            found.add(name)
    return sorted(found)


def scatter(cache: Path, seed: int) -> dict[Path, bytes]:
    """Put other people's files into a cache; return them."""
    mine = {}
    for name in [*THEIRS, *neighbours(cache, seed, 40)]:
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mine[path] = f"this is {name}".encode()
        path.write_bytes(mine[path])
    return mine


def ours(cache: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_below(cache).items() if file_of(name) is not None}


Command = Callable[[Path, Path, Path, Path], Any]

COMMANDS: dict[str, Command] = {
    "extract": lambda cache, five, base, pair: extract(tiny_config(five, cache, base, quality="default")),
    "more views": lambda cache, five, base, pair: extract(
        tiny_config(five, cache, base, quality="default", views=3)
    ),
    "other set": lambda cache, five, base, pair: extract(
        tiny_config(five, cache, base, quality="exact"), overwrite=True
    ),
    "other views": lambda cache, five, base, pair: extract(
        tiny_config(five, cache, base, quality="default", seed=7), overwrite=True
    ),
    "repair": lambda cache, five, base, pair: verify(str(cache), full=True, repair=True),
    "rm views": lambda cache, five, base, pair: remove(str(cache), views=1),
    "rm set": lambda cache, five, base, pair: remove(str(cache), target="tiny"),
    "merge": lambda cache, five, base, pair: merge(str(cache), [str(pair / "cache")]),
    "unpack": lambda cache, five, base, pair: unpack(str(pair / "pack"), str(cache)),
    "remove all": lambda cache, five, base, pair: remove_all(open_store(cache)),
    "clear": lambda cache, five, base, pair: clear_leftovers(open_store(cache)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_removing_command_leaves_every_foreign_byte(
    pair: Path, five: Path, tiny_base: Path, tmp_path: Path, name: str
) -> None:
    cache = shutil.copytree(pair / "cache", tmp_path / "cache")
    mine = scatter(cache, seed=len(name))
    leftover = cache / f"views/{FOLDER}/{UNIT}.{HASH}.tar"
    leftover.write_bytes(b"of a killed job")
    draft = cache / ".drafts" / ("0" * 32)
    draft.write_bytes(b"half a payload")
    before = ours(cache)
    COMMANDS[name](cache, five, tiny_base, pair)
    assert {path: path.read_bytes() for path in mine} == mine
    assert not leftover.exists()
    if name != "remove all":
        assert not draft.exists()
    after = ours(cache)
    if name in ("extract", "merge", "unpack", "repair", "clear"):
        assert after == {n: data for n, data in before.items() if cache / n != leftover}
    elif name == "remove all":
        assert set(after) <= {path.relative_to(cache).as_posix() for path in mine}
    else:
        assert after != before
    if name not in ("rm views", "rm set", "remove all"):
        verdict = verify(str(cache), full=True)
        assert verdict.clean, verdict.findings
        told = {finding.where for finding in verdict.findings}
        hidden = {f"{UNIT}.{HASH}.tar"}
        folders = ("records", "views", "targets", "index")
        expected = {n for n in THEIRS if n.split("/")[0] in folders and "/." not in n}
        assert expected - told <= hidden | {"targets/mine/codec.json"}, "each is named"


def test_packing_leaves_every_foreign_byte(pair: Path, tmp_path: Path) -> None:
    packed = shutil.copytree(pair / "pack", tmp_path / "pack")
    names = ["notes.tar", f"{UNIT}.tar", f"{UNIT}.{HASH}.zip", f"old/{UNIT}.{HASH}.tar", "pack.json.bak",
             f"{UNIT}.{HASH}.tar", f"samples/{UNIT}.{HASH}.tar", f"samples/{FOLDER}/{UNIT}.{HASH}.zip",
             f"samples/000001/{UNIT}.{HASH}.tar", f"views/{FOLDER}/{UNIT}.{HASH}.tar", "index/notes.idx",
             f"records/packed/{UNIT}.txt", f"records/packed/{UNIT}.json"]  # fmt: skip
    for name in names:
        (packed / name).parent.mkdir(parents=True, exist_ok=True)
        (packed / name).write_text(name)
    leftover = packed / f"samples/{FOLDER}/{UNIT}.{HASH}.tar"
    leftover.write_bytes(b"of a killed job")
    pack(str(pair / "cache"), str(packed))
    assert [(packed / name).read_text() for name in names] == names
    assert not leftover.exists()


def test_rm_says_what_it_left(pair: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(pair / "cache", tmp_path / "cache")
    for name in ("targets/tiny/README", "records/targets/tiny/notes.json"):
        (cache / name).write_text("mine")
    expected = ["records/targets/tiny/notes.json", "targets/tiny/README"]
    assert remove(str(cache), target="tiny", dry_run=True).left_alone == expected
    assert remove(str(cache), target="tiny").left_alone == expected
    assert (cache / "targets/tiny/README").read_text() == "mine"


def test_overwriting_says_what_it_left(pair: Path, five: Path, tiny_base: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(pair / "cache", tmp_path / "cache")
    names = ["mine/plan.txt", "notes.txt", "views/README.md", "targets/tiny/README", "records/views/notes.json"]
    for name in names:
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_text("mine")
    named = ["mine", *names[1:]]
    for changes in ({"seed": 7}, {"seed": 7, "quality": "exact"}):  # another cache, another target set
        config = tiny_config(five, cache, tiny_base, **({"quality": "default"} | changes))
        assert extract(config, overwrite=True, dry_run=True).foreign == []
        summary = extract(config, overwrite=True)
        assert summary.foreign == named
        assert f"kept         what is not this cache's, 5: {', '.join(named)}" in extract_text(
            summary, False, config, True
        )
        assert all((cache / name).read_text() == "mine" for name in names)
    assert extract(config).foreign == []


@pytest.mark.parametrize("name", ["target.json", "codec.json"])
@pytest.mark.parametrize("content", [b'{"targets": []}', b"mine", b'{"body": 1}', b"\x7fELF" + b"\0" * 50])
def test_documents_of_another_program_are_not_removed(pair: Path, tmp_path: Path, name: str, content: bytes) -> None:
    """target.json and codec.json are names that anybody may give; only what is sealed as ours is ours."""
    cache = shutil.copytree(pair / "cache", tmp_path / "cache")
    theirs = cache / "targets" / "theirs" / name
    theirs.parent.mkdir()
    theirs.write_bytes(content)
    clear_leftovers(open_store(cache))
    assert theirs.read_bytes() == content
    assert remove_target_set(open_store(cache), "theirs").left == [f"targets/theirs/{name}"]
    remove_all(open_store(cache))
    assert theirs.read_bytes() == content


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "zeros"])
def test_our_own_documents_go_even_if_they_are_damaged(pair: Path, tmp_path: Path, harm: str) -> None:
    cache = shutil.copytree(pair / "cache", tmp_path / "cache")
    for name in ("target.json", "codec.json"):
        path = cache / "targets" / "tiny" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        harmed = {"flipped": bytes(data), "cut": bytes(data[:100]), "empty": b"", "zeros": b"\0" * 300}[harm]
        path.write_bytes(harmed)
    assert remove(str(cache), target="tiny").left_alone == []
    assert not (cache / "targets").exists()


@pytest.mark.parametrize("content", [b'{"version": 3}', b"mine"])
def test_a_folder_with_another_programs_cache_json_is_refused(
    pair: Path, five: Path, tiny_base: Path, tmp_path: Path, content: bytes
) -> None:
    """Whatever lies there may bear our names: without a manifest of ours nothing is known to be ours."""
    folder = tmp_path / "theirs"
    (folder / "views" / FOLDER).mkdir(parents=True)
    (folder / "cache.json").write_bytes(content)
    (folder / "views" / FOLDER / f"{UNIT}.{HASH}.tar").write_bytes(b"theirs")
    before = files_below(folder)
    for command in (
        lambda: extract(tiny_config(five, folder, tiny_base)),
        lambda: extract(tiny_config(five, folder, tiny_base), overwrite=True),
        lambda: extract(tiny_config(five, folder, tiny_base), dry_run=True),
        lambda: remove(str(folder), views=1),
        lambda: merge(str(folder), [str(pair / "cache")]),
        lambda: unpack(str(pair / "pack"), str(folder)),
        lambda: pack(str(pair / "cache"), str(folder)),
    ):
        with pytest.raises((CacheError, ConfigError)):
            command()
    assert not verify(str(folder), repair=True).clean
    assert {n: d for n, d in files_below(folder).items() if n != ".lock"} == before


@pytest.mark.parametrize("name", ["notes.txt", "views/photo.jpg", "records/2024.csv", "src/main.py", "targets/a/b.txt"])
def test_a_new_cache_wants_a_folder_of_its_own(
    pair: Path, five: Path, tiny_base: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "project"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    for command in (
        lambda: extract(tiny_config(five, folder, tiny_base)),
        lambda: extract(tiny_config(five, folder, tiny_base), dry_run=True),
        lambda: merge(str(folder), [str(pair / "cache")]),
        lambda: unpack(str(pair / "pack"), str(folder)),
        lambda: pack(str(pair / "cache"), str(folder)),
    ):
        with pytest.raises(ConfigError, match="no cache here, and there are other files") as caught:
            command()
        assert name.split("/")[0] in str(caught.value)
    assert list(files_below(folder)) == [name]


@pytest.mark.parametrize(
    "name",
    ["", "lost+found/x", ".hidden", f"views/{FOLDER}/{UNIT}.{HASH}.tar", "records/asked/00.json", "index/views.idx"],
)
def test_an_empty_folder_and_what_is_left_of_a_cache_are_taken(pair: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    if name:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        theirs = pair / "cache" / name
        (folder / name).write_bytes(theirs.read_bytes() if name.startswith("records/") else b"")
    merge(str(folder), [str(pair / "cache")])
    assert open_cache(folder).view_units == open_cache(pair / "cache").view_units
    assert open_cache(folder).index is not None


def test_a_damaged_record_in_the_folder_is_named(pair: Path, tmp_path: Path) -> None:
    """It is neither a reason to refuse the folder nor passed over in silence: nothing that is there is replaced."""
    record = tmp_path / "disk" / "records" / "asked" / "00.json"
    record.parent.mkdir(parents=True)
    record.write_bytes(b"")
    with pytest.raises(CacheError, match="damaged record") as caught:
        merge(str(tmp_path / "disk"), [str(pair / "cache")])
    assert caught.value.where == str(record)
    assert verify(str(tmp_path / "disk"), repair=True).count("damage") == 0
    merge(str(tmp_path / "disk"), [str(pair / "cache")])
    assert verify(str(tmp_path / "disk"), full=True).findings == []


def test_planning_leaves_nothing_and_takes_nothing(pair: Path, five: Path, tiny_base: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(pair / "cache", tmp_path / "cache")
    mine = scatter(cache, seed=3)
    before = files_below(tmp_path)
    config = tiny_config(five, cache, tiny_base, quality="default", views=3)
    plan(PlanConfig(extract=config, train=tiny_training(cache, tmp_path / "run"), seconds=0.1))
    assert files_below(tmp_path) == before
    assert all(path.read_bytes() == data for path, data in mine.items())


def test_a_caches_own_folder_is_no_place_for_copies(pair: Path, tmp_path: Path) -> None:
    """Copies have the names of payloads: what makes room among them would make room among the payloads."""
    for folder in (pair / "cache" / "views", pair / "cache" / "targets" / "tiny", pair / "pack"):
        before = files_below(folder)
        with pytest.raises(ConfigError, match="no stage folder"):
            StagedStore(open_store(pair / "cache"), folder, 1)
        assert files_below(folder) == before


def test_of_the_drafts_only_ours_go(tmp_path: Path) -> None:
    store, drafts = open_store(tmp_path / "cache"), tmp_path / "cache" / ".drafts"
    scratch = drafts / ".tec-cache-plan-0123456789ab"
    (scratch / "views").mkdir(parents=True)
    (scratch / "views" / "x.tar").write_bytes(b"of a killed plan")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_bytes(b"mine")
    (drafts / ".tec-cache-plan-ba9876543210").symlink_to(outside)
    (scratch / "linked").symlink_to(outside)
    for name in ("0" * 32, f".{UNIT}.json.0123456789ab.tmp", "notes", ".x.tmp"):
        (drafts / name).write_bytes(b"x")
    clear_leftovers(store)
    assert sorted(path.name for path in drafts.iterdir()) == [".tec-cache-plan-ba9876543210", ".x.tmp", "notes"]
    assert (outside / "mine").read_bytes() == b"mine"
