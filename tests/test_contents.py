"""What tells a source shard from another of its name: the identity of a cache, and what is refused when it goes on."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.extract import extract
from pipelines.extraction.extract_summary import Summary
from pipelines.merge import merge
from tec_cache.cache.opening import open_cache
from tec_cache.config import ExtractConfig
from tec_cache.data.contents import read_contents
from tec_cache.data.photos import Shard
from tec_cache.data.source import open_source
from tec_cache.errors import IdentityError, SourceError
from tests.conftest import encoded, files_below, photo, tiny_config, write_shards, write_tar

END = 64 * 1024
LARGE = encoded(photo(0, 400, 300), quality=100, subsampling=0)
"""More than END bytes."""


def find_shards(source: str) -> list[Shard]:
    return open_source(source).shards


def views_only(source: object, cache: Path, **changes: object) -> ExtractConfig:
    values: dict[str, object] = {"views_only": True, "group_size": 4}
    return tiny_config(None, cache, None, input=str(source), size=32, grid=4, **(values | changes))


def make(source: object, cache: Path, **changes: object) -> Summary:
    return extract(views_only(source, cache, **changes))


# ---- what is hashed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, END - 1, END, END + 1, 2 * END - 1, 2 * END, 2 * END + 1, 5 * END + 7])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_the_contents_of_a_tar(tmp_path: Path, size: int, suffix: str) -> None:
    """As the format's document says them, for files of any size, compressed or not."""
    data = os.urandom(size)
    (tmp_path / f"a.{suffix}").write_bytes(data)
    (shard,) = find_shards(str(tmp_path))
    wanted = hashlib.sha256(size.to_bytes(8, "little") + data[:END] + data[-END:]).hexdigest()
    assert shard.identity() == {"name": f"a.{suffix}", "size": size, "ends_sha256": wanted}


def test_the_contents_of_a_part_of_a_folder(tmp_path: Path) -> None:
    for name in ("b/1.jpg", "a/2.jpg", "a/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 30_000)
    (shard,) = find_shards(str(tmp_path))
    names = [item.key for item in shard.photos()]
    digest = hashlib.sha256()
    for name in names:
        digest.update(len(name).to_bytes(8, "little") + name.encode() + (30_000 * 7).to_bytes(8, "little"))
    for name in (names[0], names[-1]):
        digest.update((name.encode() * 30_000)[:END])
    identity = shard.identity()
    assert (identity["size"], identity["ends_sha256"]) == (3 * 7 * 30_000, digest.hexdigest())


def test_neither_times_nor_places_count(tmp_path: Path) -> None:
    for name, source in (("tars", write_shards(tmp_path / "t", [2, 1])), ("photos", tmp_path / "p")):
        if name == "photos":
            (source / "cat").mkdir(parents=True)
            (source / "cat" / "1.jpg").write_bytes(LARGE)
        copy = Path(shutil.copytree(source, tmp_path / "elsewhere" / name, copy_function=shutil.copyfile))
        for path in copy.rglob("*.*"):
            os.utime(path, (0, 0))
        one, other = ([shard.identity() for shard in find_shards(str(root))] for root in (source, copy))
        assert one == other


def test_every_shard_is_told_of_in_order(tmp_path: Path) -> None:
    shards = find_shards(str(write_shards(tmp_path, [1, 2, 3])))
    told: list[int] = []
    found = read_contents(shards, lambda contents: told.append(contents.size))
    assert told == [contents.size for contents in found] == [shard.size for shard in shards]


# ---- other photos under the same names -----------------------------------------------------------------------


def exchange(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file and nothing of its size and times."""
    stat = path.stat()
    data = change(path.read_bytes())
    assert len(data) == stat.st_size
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def flipped(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position:][1:]


@pytest.mark.parametrize("position", [0, 700, END - 1, -END, -1])
@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_with_another_byte_at_an_end_is_refused_by_name(tmp_path: Path, position: int, packed: bool) -> None:
    source = write_shards(tmp_path / "in", [1, 1, 1])
    write_tar(source / "shard-000001.tar", [(f"p{i}.jpg", LARGE) for i in range(3)])
    if packed:
        for path in source.iterdir():
            path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            path.unlink()
    (path,) = source.glob("*1.tar*")
    make(source, tmp_path / "cache", views=1)
    before = files_below(tmp_path / "cache")
    exchange(path, flipped(position))
    for changes in ({"views": 2}, {"views": 1}, {}):
        for dry_run in (True, False):
            with pytest.raises(IdentityError, match=f"source shard {path.name} has changed") as caught:
                extract(views_only(source, tmp_path / "cache", **changes), dry_run=dry_run)
            assert caught.value.where == str(path)
    assert files_below(tmp_path / "cache") == before
    extract(views_only(source, tmp_path / "other", views=1, on_error="skip"))
    assert open_cache(tmp_path / "other").fingerprint != open_cache(tmp_path / "cache").fingerprint


@pytest.mark.parametrize("change", ["a photo of another size", "another first photo", "another last photo"])
def test_a_folder_with_other_photos_is_refused(tmp_path: Path, change: str) -> None:
    source = tmp_path / "in"
    (source / "cat").mkdir(parents=True)
    for number in range(6):
        (source / "cat" / f"{number}.jpg").write_bytes(encoded(photo(number)))
    make(source, tmp_path / "cache", views=1)
    (shard,) = find_shards(str(source))
    keys = [item.key for item in shard.photos()]
    if change == "a photo of another size":
        (source / keys[2]).write_bytes(encoded(photo(99)))
    else:
        exchange(source / keys[0 if "first" in change else -1], flipped(500))
    with pytest.raises(IdentityError, match="source shard folder-000000 has changed"):
        make(source, tmp_path / "cache", views=2)


def test_a_whole_set_exchanged_under_the_same_names_and_sizes(tmp_path: Path) -> None:
    one, other = write_shards(tmp_path / "one", [3, 3]), write_shards(tmp_path / "other", [3, 3], start=50)
    for path in other.iterdir():  # the same names of photos, and files of the same sizes
        write_tar(path, [(f"p{i}.jpg", encoded(photo(50 + i))) for i in range(3)])
        write_tar(one / path.name, [(f"p{i}.jpg", encoded(photo(i))) for i in range(3)])
        size = max(path.stat().st_size, (one / path.name).stat().st_size)
        for tar in (path, one / path.name):
            os.truncate(tar, size)
    make(one, tmp_path / "cache", views=1)
    with pytest.raises(IdentityError, match=r"shard-000000\.tar has changed: it has as many bytes"):
        make(other, tmp_path / "cache", views=2)
    assert make(one, tmp_path / "cache", views=2).views_made == 6


def test_a_limit_looks_at_the_shards_that_it_takes(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", [3, 3, 3])
    make(source, tmp_path / "cache", views=1, limit=4)
    stored = open_cache(tmp_path / "cache").identity["source"]["shards"]
    identities = [shard.identity() for shard in find_shards(str(source))]
    assert stored == [identities[0] | {"take": 3}, identities[1] | {"take": 1}]
    exchange(source / "shard-000002.tar", flipped(700))  # of which no photo is in the cache
    assert make(source, tmp_path / "cache", views=2).views_made == 4
    exchange(source / "shard-000001.tar", flipped(700))
    with pytest.raises(IdentityError, match=r"shard-000001\.tar has changed"):
        make(source, tmp_path / "cache", views=3)


def test_overwrite_replaces_a_cache_of_other_photos(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", [2, 2])
    make(source, tmp_path / "cache", views=2)
    write_tar(source / "shard-000001.tar", [("q.jpg", encoded(photo(9)))])
    extract(views_only(source, tmp_path / "cache", views=1), overwrite=True)
    make(source, tmp_path / "fresh", views=1)
    assert files_below(tmp_path / "cache") == files_below(tmp_path / "fresh")


# ---- parts that are made apart -------------------------------------------------------------------------------


def test_parts_of_copies_on_several_machines_merge(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "a" / "in", [5, 5, 5, 5])
    copy = Path(shutil.copytree(source, tmp_path / "b" / "copy", copy_function=shutil.copyfile))
    for number, root in enumerate((source, copy), start=1):
        make(root, tmp_path / f"part{number}", views=1, part=f"{number}/2")
    merge(str(tmp_path / "out"), [str(tmp_path / "part1"), str(tmp_path / "part2")])
    make(source, tmp_path / "whole", views=1)
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")


def test_parts_of_other_photos_do_not_and_the_shard_is_named(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "a", [2, 2])
    make(source, tmp_path / "part1", views=1, part="1/2")
    exchange(source / "shard-000001.tar", flipped(700))
    make(source, tmp_path / "part2", views=1, part="2/2", on_error="skip")
    with pytest.raises(IdentityError, match=r"source\.shards\[1, shard-000001\.tar\]\.ends_sha256"):
        merge(str(tmp_path / "out"), [str(tmp_path / "part1"), str(tmp_path / "part2")])


# ---- what an error asks to be mended -------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def spoil_photo(path: Path) -> None:
    data = path.read_bytes()
    at = data.rindex(b"p00012.jpg") + 512
    path.write_bytes(data[:at] + bytes(600) + data[at + 600 :])


@pytest.mark.parametrize("harm", [cut, spoil_photo])
def test_a_mended_shard_goes_on(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """A shard that stops an extraction is to be mended, as the error says; what was made before is kept."""
    source, cache = write_shards(tmp_path / "in", [5, 9, 3]), tmp_path / "cache"
    path = source / "shard-000001.tar"
    good = path.read_bytes()
    harm(path)
    bad = path.read_bytes()
    with pytest.raises(SourceError):
        make(source, cache, views=1)
    before = files_below(cache)
    assert [name for name in before if name.startswith("records/views")]
    path.write_bytes(good)
    assert make(source, cache, views=1).missing == 0
    assert {name: data for name, data in files_below(cache).items() if name in before} == before
    assert make(source, cache, views=2).photos == 17
    # from now on it is the mended one that counts
    path.write_bytes(bad)
    with pytest.raises(IdentityError, match=r"shard-000001\.tar has changed"):
        make(source, cache, views=3)
    path.write_bytes(good)
    make(source, tmp_path / "whole", views=2)
    whole = open_cache(tmp_path / "whole")
    mended = open_cache(cache)
    for unit in whole.view_units:
        assert mended.views_record(unit).crc32 == whole.views_record(unit).crc32


def test_a_mended_photo_of_a_folder_goes_on(tmp_path: Path) -> None:
    source, cache = tmp_path / "in", tmp_path / "cache"
    (source / "cat").mkdir(parents=True)
    for number in range(9):
        (source / "cat" / f"{number}.jpg").write_bytes(encoded(photo(number)))
    (shard,) = find_shards(str(source))
    last = source / [item.key for item in shard.photos()][-1]
    good = last.read_bytes()
    last.write_bytes(good[:200])
    with pytest.raises(SourceError, match="not a whole image"):
        make(source, cache, views=1)
    last.write_bytes(good)
    assert make(source, cache, views=1).photos == 9
    assert make(source, cache, views=2).photos == 9
