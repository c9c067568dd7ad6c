"""Bad input through the command line: what stops, what is left out and named, and that a cache never changes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shlex
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

import cli
from tec_cache.cache.layout import Unit, crop_name
from tec_cache.cache.opening import open_cache
from tec_cache.cache.pixels import decode_crop
from tec_cache.cache.reader import Cache
from tests.conftest import encoded, files_below, payload_of, photo, write_shards, write_tar, write_tiny_base


@dataclass
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        (line,) = self.out.splitlines()  # exactly one object, on one line
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    @property
    def lines(self) -> list[str]:
        """The error, which must have three lines: what, where, remedy (and behind it the command that goes on)."""
        lines = self.err.splitlines()
        if "the same command goes on" in lines[2] and len(lines) == 4:
            command = lines.pop()
            assert command.strip() == shlex.join(sys.argv)
        assert len(lines) == 3, self.err
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("  where: ")
        assert lines[2].startswith("  to do: ")
        assert self.out == ""
        return [
            lines[0].removeprefix("error: "),
            lines[1].removeprefix("  where: "),
            lines[2].removeprefix("  to do: "),
        ]


Run = Callable[..., Ran]


@pytest.fixture
def tec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def run(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["tec-cache", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        if "--debug" not in args:
            assert "Traceback" not in out + err
        return Ran(int(caught.value.code or 0), out, err)

    return run


SMALL = ["--size", 32, "--grid", 4, "--group-size", 4, "--workers", 2, "--quiet"]


TARGETS = ["--k", 3, "--batch-size", 8, "--quality", "exact", "--threads", 1, "--device", "cpu"]


def extract_args(source: Path, cache: Path, base: Path | None, *more: object) -> list[object]:
    """Two views of 32 pixels and the targets of a tiny base; an option among `more` replaces the one here."""
    targets = ["--views-only"] if base is None else ["--base", base, *TARGETS]
    words = ["--cache", cache, "--views", 2, *SMALL, *targets]
    options = [place for place, word in enumerate(words) if str(word).startswith("--")]
    pairs = [words[start:stop] for start, stop in itertools.pairwise([*options, len(words)])]
    return ["extract", source, *(word for pair in pairs if pair[0] not in more for word in pair), *more]


def good(*numbers: int) -> list[tuple[str, bytes]]:
    """Members of whole photos."""
    pairs = ([(f"p{i}.jpg", encoded(photo(i))), (f"p{i}.cls", b"%d" % i)] for i in numbers)
    return [member for pair in pairs for member in pair]


def keys_of(cache: Cache, view: int) -> list[str]:
    return [key for unit in cache.view_units if unit.view == view for key in cache.views_record(unit).keys]


def times_below(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


# ---- broken photos and shards --------------------------------------------------------------------------------


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


JPEG = encoded(photo(100))
# members of the broken sample -> its key, what the message says
BROKEN_PHOTOS: dict[str, tuple[list[tuple[str, bytes]], str, str]] = {
    "truncated JPEG": ([("bad.jpg", half(JPEG)), ("bad.cls", b"1")], "bad", "not a whole image: "),
    "JPEG of zero bytes": ([("bad.jpg", b"")], "bad", "not an image of a known format"),
    "text named .jpg": ([("bad.jpg", b"hello, I am a letter")], "bad", "not an image of a known format"),
    "duplicate key": ([("p0.jpg", JPEG), ("p0.cls", b"1")], "p0", "its key appears twice in the shard"),
    "no image": ([("bad.cls", b"1")], "bad", "no image among its fields (cls)"),
}


def broken_photo(folder: Path, name: str) -> Path:
    """A whole shard, then one whose middle sample (of the second group of four) is broken."""
    members, _, _ = BROKEN_PHOTOS[name]
    write_tar(folder / "0.tar", good(7, 8))
    write_tar(folder / "1.tar", good(*range(5)) + members + good(5))
    return folder


@pytest.mark.parametrize("name", BROKEN_PHOTOS)
def test_a_broken_photo_stops(tec: Run, tmp_path: Path, tiny_base: Path, name: str) -> None:
    _, key, problem = BROKEN_PHOTOS[name]
    source = broken_photo(tmp_path / "in", name)
    ran = tec(*extract_args(source, tmp_path / "cache", tiny_base, "--on-error", "stop"))
    assert ran.code == 1
    what, where, todo = ran.lines
    assert what.startswith(f"photo {key!r}: {problem}")
    assert where == str(source / "1.tar")
    assert "--on-error skip" in todo
    # stop is the default, and --json says the same
    again = tec(*extract_args(source, tmp_path / "cache", tiny_base, "--json"))
    assert again.code == 1
    assert again.json == {"error": {"what": what, "where": where, "todo": todo, "exit_code": 1}}
    # the remedy works, on the cache as it was left
    skip = tec(*extract_args(source, tmp_path / "cache", tiny_base, "--json", "--on-error", "skip"))
    assert skip.code == 0
    assert skip.json["photos"] == 8


@pytest.mark.parametrize("name", BROKEN_PHOTOS)
def test_a_broken_photo_is_left_out_of_all_views_and_named(
    tec: Run, tmp_path: Path, tiny_base: Path, name: str
) -> None:
    _, key, problem = BROKEN_PHOTOS[name]
    source, path = broken_photo(tmp_path / "in", name), tmp_path / "cache"
    command = extract_args(source, path, tiny_base, "--on-error", "skip", "--views", 3, "--json")
    ran = tec(*command)
    assert ran.code == 0
    assert ran.err == ""
    (left_out,) = ran.json["skipped"]
    assert left_out[:2] == ["1.tar", key]
    assert left_out[2].startswith(problem)
    assert (ran.json["photos"], ran.json["views_made"], ran.json["targets_made"]) == (8, 24, 24)
    assert (ran.json["missing"], ran.json["shards_left"]) == (0, 0)
    cache = open_cache(path)
    for view in range(3):
        assert keys_of(cache, view) == ["p7", "p8", "p0", "p1", "p2", "p3", "p4", "p5"]
        assert cache.views_record(Unit(1, 1, view)).skipped == [[key, left_out[2]]]
        assert cache.views_record(Unit(1, 0, view)).skipped == []
        with tarfile.open(payload_of(cache, Unit(1, 1, view))) as tar:
            names = {crop_name(k, view) for k in ("p4", "p5")}
            assert set(tar.getnames()) == {f"{n}.{e}" for n in names for e in ("jpg", "cls")}
    assert cache.views_record(Unit(1, 1, 0)).labels == [4, 5]
    assert cache["tiny"].record(Unit(1, 1, 2)).count == 2
    # named again by a run that has nothing to do, and for people
    again = tec(*command)
    assert again.json["skipped"] == ran.json["skipped"]
    assert again.json["views_made"] == again.json["targets_made"] == 0
    told = tec(*command[:-1])
    assert "left out     1:" in told.out
    assert f"1.tar {key}: {problem}" in told.out


def cut_in_the_middle(data: bytes) -> bytes:
    with_p3 = data.index(b"p3.jpg")
    return data[: with_p3 + 700]


def corrupt_header(data: bytes) -> bytes:
    at = data.index(b"p3.jpg")
    return data[:at] + b"q" + data[at + 1 :]


def hole(data: bytes) -> bytes:
    at = data.index(b"p3.jpg")
    return data[:at] + bytes(512) + data[at + 512 :]


# what becomes of the tar -> photos before the damage, what the message says, the remedy
BROKEN_SHARDS: dict[str, tuple[Callable[[bytes], bytes], list[str], str, str]] = {
    "empty tar": (lambda data: b"", [], "damaged shard", "--on-error skip"),
    "tar without members": (lambda data: bytes(10240), [], "the shard holds no photos", "leave it out"),
    "tar cut in the middle": (cut_in_the_middle, ["p0", "p1"], "damaged shard", "--on-error skip"),
    "corrupt header": (corrupt_header, ["p0", "p1"], "damaged shard: corrupt at byte", "--on-error skip"),
    "hole of zeros": (hole, ["p0", "p1"], "damaged shard: its end marker", "--on-error skip"),
    "no tar at all": (lambda data: b"hello\n" * 500, [], "damaged shard", "--on-error skip"),
}


def broken_shard(folder: Path, name: str) -> Path:
    """A whole shard on either side of a broken one."""
    write_tar(folder / "0.tar", good(7, 8))
    path = write_tar(folder / "1.tar", good(*range(6)))
    path.write_bytes(BROKEN_SHARDS[name][0](path.read_bytes()))
    write_tar(folder / "2.tar", good(9))
    return folder


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_a_broken_shard_stops(tec: Run, tmp_path: Path, tiny_base: Path, name: str) -> None:
    _, _, problem, remedy = BROKEN_SHARDS[name]
    source = broken_shard(tmp_path / "in", name)
    ran = tec(*extract_args(source, tmp_path / "cache", tiny_base))
    assert ran.code == 1
    what, where, todo = ran.lines
    assert problem in what
    assert where == str(source / "1.tar")
    assert remedy in todo
    again = tec(*extract_args(source, tmp_path / "cache", tiny_base, "--json"))
    assert again.json["error"]["what"] == what


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_a_broken_shard_gives_what_comes_before_the_damage(
    tec: Run, tmp_path: Path, tiny_base: Path, name: str
) -> None:
    _, before, problem, _ = BROKEN_SHARDS[name]
    source, path = broken_shard(tmp_path / "in", name), tmp_path / "cache"
    command = extract_args(source, path, tiny_base, "--on-error", "skip", "--json")
    ran = tec(*command)
    assert ran.code == 0
    (left_out,) = ran.json["skipped"]
    assert left_out[:2] == ["1.tar", ""]
    assert problem in left_out[2]
    assert (ran.json["missing"], ran.json["shards_left"]) == (0, 0)
    cache = open_cache(path)
    for view in range(2):
        assert keys_of(cache, view) == ["p7", "p8", *before, "p9"]
    assert ran.json["targets_made"] == 2 * len(keys_of(cache, 0))
    record = cache.source_record(1)
    assert record is not None
    assert problem in record.damage
    untouched = files_below(path)
    assert tec(*command).json["skipped"] == ran.json["skipped"]
    assert files_below(path) == untouched
    told = tec("info", path)
    assert told.code == 0


def test_skipping_leaves_the_same_cache_whatever_came_before(tec: Run, tmp_path: Path, tiny_base: Path) -> None:
    """A run that stopped, then one that skips, give what one run gives that skips from the start."""
    source = broken_photo(tmp_path / "in", "text named .jpg")
    assert tec(*extract_args(source, tmp_path / "a", tiny_base)).code == 1
    assert tec(*extract_args(source, tmp_path / "a", tiny_base, "--on-error", "skip")).code == 0
    assert tec(*extract_args(source, tmp_path / "b", tiny_base, "--on-error", "skip")).code == 0
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def test_a_shard_of_nothing_but_broken_photos(tec: Run, tmp_path: Path, tiny_base: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", [(f"bad{i}.jpg", b"letter") for i in range(5)])
    write_tar(tmp_path / "in" / "1.tar", good(1))
    command = extract_args(tmp_path / "in", tmp_path / "cache", tiny_base, "--on-error", "skip", "--json")
    ran = tec(*command)
    assert ran.code == 0
    assert [key for _, key, _ in ran.json["skipped"]] == [f"bad{i}" for i in range(5)]
    assert (ran.json["photos"], ran.json["missing"]) == (1, 0)
    untouched = files_below(tmp_path / "cache")
    assert tec(*command).code == 0
    assert files_below(tmp_path / "cache") == untouched


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_keys_with_dots_and_photos_of_one_pixel_are_no_errors(
    tec: Run, tmp_path: Path, tiny_base: Path, on_error: str
) -> None:
    tiny, thin = photo(1, 1, 1), photo(2, 300, 1)
    members = [("n01.5_x.jpg", encoded(photo(3))), ("n01.5_x.cls", b"3"), ("n01.6_y.jpg", encoded(photo(4)))]
    members += [("one.png", encoded(tiny, "PNG")), ("sub/thin.jpg", encoded(thin)), ("ü %.jpg", encoded(photo(5)))]
    write_tar(tmp_path / "in" / "0.tar", members)
    path = tmp_path / "cache"
    ran = tec(*extract_args(tmp_path / "in", path, tiny_base, "--on-error", on_error, "--json"))
    assert ran.code == 0
    assert ran.json["skipped"] == []
    keys = ["n01.5_x", "n01.6_y", "one", "sub/thin", "ü %"]
    cache = open_cache(path)
    assert keys_of(cache, 0) == keys_of(cache, 1) == keys
    assert cache.views_record(Unit(0, 0, 0)).labels == [3, None, None, None]
    urls = [str(payload_of(cache, Unit(0, group, 1))) for group in (0, 1)]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [crop_name(key, 1) for key in keys]
    assert all(decode_crop(sample["jpg"]).shape == (32, 32, 3) for sample in samples)
    assert len({tuple(decode_crop(samples[2]["jpg"]).reshape(-1, 3)[i]) for i in range(32 * 32)}) == 1


def test_a_damaged_shard_beyond_or_below_the_limit(tec: Run, tmp_path: Path) -> None:
    source = broken_shard(tmp_path / "in", "tar cut in the middle")
    # the damage is behind the limit: nobody sees it
    ran = tec(*extract_args(source, tmp_path / "a", None, "--limit", 4, "--json"))
    assert ran.code == 0
    assert ran.json["skipped"] == []
    assert keys_of(open_cache(tmp_path / "a"), 0) == ["p7", "p8", "p0", "p1"]
    # the limit reaches over it
    ran = tec(*extract_args(source, tmp_path / "b", None, "--limit", 5, "--json"))
    assert ran.code == 1
    assert "damaged shard" in ran.json["error"]["what"]
    ran = tec(*extract_args(source, tmp_path / "b", None, "--limit", 5, "--on-error", "skip", "--json"))
    assert ran.code == 0
    assert [entry[:2] for entry in ran.json["skipped"]] == [["1.tar", ""]]
    assert keys_of(open_cache(tmp_path / "b"), 0) == ["p7", "p8", "p0", "p1", "p9"]


# ---- the base ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 5 and 3 photos."""
    return write_shards(tmp_path_factory.mktemp("small"), [5, 3])


@pytest.mark.parametrize(("base", "near"), [("maee", "mae"), ("dinov2_samll", "dinov2_small"), ("./no/folder", "")])
def test_an_unknown_base_names_the_nearest(tec: Run, tmp_path: Path, small: Path, base: str, near: str) -> None:
    command = ["extract", small, "--cache", tmp_path / "cache", *SMALL, "--base", base]
    ran = tec(*command)
    assert ran.code == 2
    assert f"unknown base {base!r}" in ran.err
    assert near in ran.err.split("\n")[0]
    assert ("dinov2_giant_reg" in ran.err) == (not near), "all of them are listed where none is near"
    assert tec(*command, "--json").json["error"]["exit_code"] == 2


def test_an_unknown_timm_model_names_the_nearest(tec: Run, tmp_path: Path, small: Path) -> None:
    ran = tec("extract", small, "--cache", tmp_path / "c", *SMALL, "--base", "timm:vit_bse_patch16_224")
    assert ran.code == 2
    assert "vit_base_patch16_224" in ran.err


def test_weights_of_another_architecture(tec: Run, tmp_path: Path, small: Path, tiny_base: Path) -> None:
    other = write_tiny_base(tmp_path / "other", embed_dim=96)
    deeper = write_tiny_base(tmp_path / "deeper", depth=4)
    for folder in (other, deeper):
        weights = folder / "model.safetensors"
        command = extract_args(small, tmp_path / "cache", tiny_base, "--base-weights", weights)
        ran = tec(*command)
        assert ran.code == 1, ran.err
        assert tec(*command, "--json").json["error"]["exit_code"] == 1
        assert "to do: " in ran.err
    assert not (tmp_path / "cache" / "targets").exists()


def test_a_weight_file_that_is_none(tec: Run, tmp_path: Path, small: Path, tiny_base: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"hello")
    ran = tec(*extract_args(small, tmp_path / "cache", tiny_base, "--base-weights", weights))
    assert ran.code == 1
    assert ran.lines[1] == str(weights)


# ---- the output ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "cache", "deep/er/cache"])
def test_a_cache_below_a_regular_file(tec: Run, tmp_path: Path, small: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    ran = tec(*extract_args(small, file / below, None))
    assert ran.code == 1
    what, where, todo = ran.lines
    assert "cannot be written" in what
    assert str(file / below).startswith(where), "the file, or what cannot be below it"
    assert where.startswith(str(file))
    assert "--cache" in todo
    assert tec(*extract_args(small, file / below, None, "--json")).json["error"]["exit_code"] == 1
    assert file.read_text() == "in the way"


@pytest.mark.parametrize("name", ["views", "records", "targets"])
def test_a_file_in_the_way_inside_the_cache(tec: Run, tmp_path: Path, small: Path, tiny_base: Path, name: str) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / name).write_text("in the way")
    ran = tec(*extract_args(small, cache, tiny_base))
    assert ran.code == 1
    assert ran.lines[1].startswith(str(cache / name))
    (cache / name).unlink()
    assert tec(*extract_args(small, cache, tiny_base)).code == 0


@pytest.mark.parametrize(
    "after",
    [
        "records/views/000000/000000.000-v00.json",
        "records/source/000000.json",
        "records/targets/tiny/000000/000000.000-v00.json",
    ],
)
def test_a_full_disk_keeps_what_is_finished(
    tec: Run, tmp_path: Path, small: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Full some writes after one that is named."""
    real, left = os.fsync, 8

    def fsync(handle: int) -> None:
        nonlocal left
        left -= (tmp_path / "cache" / after).exists()
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    command = extract_args(small, tmp_path / "cache", tiny_base)
    ran = tec(*command)
    assert ran.code == 1
    first, where, todo, again = (line.strip() for line in ran.err.splitlines())
    what, where = first.removeprefix("error: "), where.removeprefix("where: ")
    # the bytes needed, the bytes there are, and how to go on
    needed = r"about [\d.]+ [kKM]?B more are needed for the (views|targets)"
    assert re.fullmatch(rf"the disk is full: {needed}( and {needed})?, [\d.]+ .?B are free", what), what
    assert where.startswith(str(tmp_path / "cache"))
    assert todo.endswith("the same command goes on")
    assert again.startswith("tec-cache extract")
    kept = open_cache(tmp_path / "cache")
    assert kept.view_units
    assert (tmp_path / "cache" / after).exists()
    monkeypatch.setattr(os, "fsync", real)
    ran = tec(*command, "--json")
    assert ran.code == 0
    assert ran.json["views_made"] + ran.json["targets_made"] < 32
    assert tec(*extract_args(small, tmp_path / "fresh", tiny_base)).code == 0
    assert files_below(tmp_path / "cache") == files_below(tmp_path / "fresh")


# ---- a cache made with other settings ------------------------------------------------------------------------


@pytest.fixture
def cache(tec: Run, tmp_path: Path, small: Path, tiny_base: Path) -> Path:
    """A whole cache of two views and one target set."""
    assert tec(*extract_args(small, tmp_path / "made", tiny_base)).code == 0
    return tmp_path / "made"


def test_other_view_settings_are_all_named(tec: Run, cache: Path, small: Path, tiny_base: Path) -> None:
    untouched = files_below(cache)
    changes = ["--size", 48, "--grid", 6, "--seed", 3, "--jpeg-quality", 80, "--flip", 0, "--scale", 0.3, 1]
    changes += ["--group-size", 5, "--jpeg-subsampling", 444, "--limit", 3]
    ran = tec(*extract_args(small, cache, tiny_base, *changes))
    assert ran.code == 2
    for field in ("views.size: stored 32, asked 48", "grid: stored 4, asked 6", "views.seed: stored 0, asked 3"):
        assert field in ran.err
    for field in ("jpeg.quality: stored 90, asked 80", "views.flip: stored 0.5", "views.scale: stored [0.2, 1.0]"):
        assert field in ran.err
    for field in (
        "group_size: stored 4, asked 5",
        'jpeg.subsampling: stored "420"',
        "source.limit: stored null, asked 3",
    ):
        assert field in ran.err
    assert "views.ratio" not in ran.err
    assert "resizer" not in ran.err
    assert f"where: {cache / 'cache.json'}" in ran.err
    assert "--overwrite" in ran.err
    error = tec(*extract_args(small, cache, tiny_base, *changes, "--json")).json["error"]
    assert error["exit_code"] == 2
    assert "views.size" in error["what"]
    assert tec(*extract_args(small, cache, tiny_base, *changes, "--dry-run")).code == 2
    assert files_below(cache) == untouched


def test_other_target_settings_are_all_named(tec: Run, cache: Path, small: Path, tiny_base: Path) -> None:
    untouched = files_below(cache)
    changes = ["--k", 2, "--quality", "default", "--batch-size", 4, "--last-layers", 1, "--normalization", "feature"]
    ran = tec(*extract_args(small, cache, tiny_base, *changes))
    assert ran.code == 2
    for field in ("spec.k: stored 3, asked 2", "batch_size: stored 8, asked 4", "last_layers: stored 2, asked 1"):
        assert field in ran.err
    for field in ('codec.name: stored "exact", asked "transform"', "codec.mse: stored null, asked 0.04"):
        assert field in ran.err
    for field in ("codec.fit_views: stored null, asked 512", "spec.normalization: stored"):
        assert field in ran.err
    assert "spec.channels" not in ran.err
    assert files_below(cache) == untouched


def test_settings_that_are_not_given_are_the_caches(tec: Run, cache: Path, small: Path, tiny_base: Path) -> None:
    untouched, times = files_below(cache), times_below(cache)
    ran = tec("extract", small, "--cache", cache, "--base", tiny_base, "--device", "cpu", "--quiet", "--json")
    assert ran.code == 0
    assert (ran.json["num_views"], ran.json["views_made"], ran.json["targets_made"]) == (2, 0, 0)
    assert files_below(cache) == untouched
    assert times_below(cache) == times


def test_a_second_run_changes_nothing(tec: Run, cache: Path, small: Path, tiny_base: Path) -> None:
    untouched, times = files_below(cache), times_below(cache)
    for more in ([], ["--dry-run"], ["--on-error", "skip"], ["--workers", 1]):
        assert tec(*extract_args(small, cache, tiny_base, *more)).code == 0
    assert files_below(cache) == untouched
    assert times_below(cache) == times


def test_a_dry_run_writes_nothing(tec: Run, tmp_path: Path, small: Path, tiny_base: Path) -> None:
    ran = tec(*extract_args(small, tmp_path / "none", tiny_base, "--dry-run", "--json"))
    assert ran.code == 0
    assert ran.json["shards_left"] == 2
    assert not (tmp_path / "none").exists()


# ---- growing -------------------------------------------------------------------------------------------------


def test_a_third_view_leaves_the_first_two_and_equals_a_fresh_cache(tec: Run, tmp_path: Path, tiny_base: Path) -> None:
    source = broken_photo(tmp_path / "in", "text named .jpg")
    skip = ["--on-error", "skip", "--json"]
    assert tec(*extract_args(source, tmp_path / "grown", tiny_base, *skip)).code == 0
    before, times = files_below(tmp_path / "grown"), times_below(tmp_path / "grown")
    ran = tec(*extract_args(source, tmp_path / "grown", tiny_base, *skip, "--views", 3))
    assert ran.code == 0
    assert (ran.json["views_made"], ran.json["targets_made"], ran.json["num_views"]) == (8, 8, 3)
    after = files_below(tmp_path / "grown")
    index = {name for name in before if name.startswith("index/")}  # of more units now
    assert {name: after[name] for name in set(before) - index} == {name: before[name] for name in set(before) - index}
    touched = {name for name in before if times_below(tmp_path / "grown")[name] != times[name]}
    assert touched - index <= {name for name in before if name.startswith("records/source/")}
    assert all("v02" in name or name == "records/asked/02.json" for name in set(after) - set(before))
    assert tec(*extract_args(source, tmp_path / "fresh", tiny_base, *skip, "--views", 3)).code == 0
    fresh = files_below(tmp_path / "fresh")
    # the codec was made, and its errors measured, from the views that were there then
    codec = "targets/tiny/codec.json"
    assert after.pop(codec) == before[codec]
    fresh.pop(codec)
    assert after == fresh
    # asking for fewer again takes nothing away
    assert tec(*extract_args(source, tmp_path / "grown", tiny_base, *skip)).json["num_views"] == 2
    assert files_below(tmp_path / "grown") == after | {codec: before[codec]}


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def test_a_shard_of_another_size_is_refused(tec: Run, tmp_path: Path, tiny_base: Path) -> None:
    source = write_shards(tmp_path / "in", [5, 3])
    assert tec(*extract_args(source, tmp_path / "cache", tiny_base)).code == 0
    untouched = files_below(tmp_path / "cache")
    write_tar(source / "shard-000001.tar", [(f"p{i}.jpg", encoded(photo(i))) for i in range(20)])
    ran = tec(*extract_args(source, tmp_path / "cache", tiny_base))
    assert ran.code == 2
    assert "shard-000001.tar has changed" in ran.err
    assert files_below(tmp_path / "cache") == untouched


def test_a_changed_shard_is_named_where_sizes_differ(tec: Run, tmp_path: Path) -> None:
    """With many shards the message still tells which one."""
    source = write_shards(tmp_path / "in", [1] * 6)
    assert tec(*extract_args(source, tmp_path / "cache", None)).code == 0
    write_tar(source / "shard-000004.tar", [(f"p{i}.jpg", encoded(photo(i))) for i in range(20)])
    ran = tec(*extract_args(source, tmp_path / "cache", None))
    assert ran.code == 2
    assert "shard-000004.tar" in ran.err


def rename_photo(path: Path, old: str, new: str) -> None:
    """Rename a sample of a tar without changing its size."""
    members = []
    with tarfile.open(path) as tar:
        for info in tar:
            stream = tar.extractfile(info)
            assert stream is not None
            members.append((info.name.replace(old, new), stream.read()))
    size = path.stat().st_size
    write_tar(path, members)
    assert path.stat().st_size == size


def test_a_shard_of_the_same_size_with_other_photos_is_refused(tec: Run, tmp_path: Path, tiny_base: Path) -> None:
    """In the middle of a shard, where only reading it tells."""
    source = write_shards(tmp_path / "in", [5, 3])
    large = encoded(photo(0, 400, 300), quality=100, subsampling=0)
    assert len(large) > 64 * 1024  # so that the ends of the tar are in the first and the last photo
    middle = [(f"p{i:05d}.jpg", large if i in (5, 9) else encoded(photo(i))) for i in range(5, 10)]
    write_tar(source / "shard-000001.tar", middle)
    assert tec(*extract_args(source, tmp_path / "cache", tiny_base)).code == 0
    untouched = files_below(tmp_path / "cache")
    rename_photo(source / "shard-000001.tar", "p00006", "q00006")
    ran = tec(*extract_args(source, tmp_path / "cache", tiny_base, "--views", 3))
    assert ran.code == 1
    what, where, todo = ran.lines
    assert "other photos" in what
    assert where == str(source / "shard-000001.tar")
    assert "restore" in todo
    after = files_below(tmp_path / "cache")
    assert {name: after[name] for name in untouched} == untouched
    assert not [name for name in set(after) - set(untouched) if "000001.000-v02" in name]


def test_a_shard_with_fewer_photos_is_refused(tec: Run, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", [8])
    path = source / "shard-000000.tar"
    assert tec(*extract_args(source, tmp_path / "cache", None)).code == 0
    size = path.stat().st_size
    write_tar(path, [(f"p{i:05d}.{e}", d) for i in range(4) for e, d in (("jpg", encoded(photo(i))), ("cls", b"1"))])
    rewrite(path, lambda data: data + bytes(size - len(data)))
    ran = tec(*extract_args(source, tmp_path / "cache", None, "--views", 3))
    assert ran.code == 2
    assert "shard-000000.tar has changed" in ran.lines[0]
    assert ran.lines[1] == str(path)


# ---- --limit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "expected"), [(3, 3), (5, 5), (6, 6), (8, 8), (100, 8)])
def test_limit_takes_the_first_photos(tec: Run, tmp_path: Path, small: Path, limit: int, expected: int) -> None:
    ran = tec(*extract_args(small, tmp_path / "cache", None, "--limit", limit, "--json"))
    assert ran.code == 0
    assert ran.json["photos"] == expected
    cache = open_cache(tmp_path / "cache")
    assert keys_of(cache, 0) == keys_of(cache, 1) == [f"p{i:05d}" for i in range(expected)]
    assert (ran.json["missing"], ran.json["shards_left"]) == (0, 0)
    assert len(cache.shards) == (1 if expected <= 5 else 2)


def test_a_limit_is_remembered_and_crops_do_not_depend_on_it(tec: Run, tmp_path: Path, small: Path) -> None:
    assert tec(*extract_args(small, tmp_path / "few", None, "--limit", 6)).code == 0
    assert tec(*extract_args(small, tmp_path / "few", None, "--views", 3)).code == 0  # as before: the limit holds
    assert tec(*extract_args(small, tmp_path / "all", None, "--views", 3)).code == 0
    few, everything = open_cache(tmp_path / "few"), open_cache(tmp_path / "all")
    assert len(keys_of(few, 2)) == 6
    for unit in few.view_units:
        one, other = few.views_record(unit), everything.views_record(unit)
        rows = range(len(one.keys))
        assert one.keys == other.keys[: len(one.keys)]
        assert few.read_crops(one, rows) == everything.read_crops(other, rows)
    ran = tec(*extract_args(small, tmp_path / "few", None, "--limit", 7))
    assert ran.code == 2
    assert "source.limit: stored 6, asked 7" in ran.err


# ---- the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["extarct"], "extract"),
        (["trian", "--cache", "x"], "train"),
        (["extract", "x", "--cahce", "y"], "--cache"),
        (["extract", "x", "--cache", "y", "--veiws", "3"], "--views"),
        (["probe", "x", "--neighbors", "3"], "--neighbours"),
        (["extract", "x", "--cache", "y", "--on-error", "skp"], "skip"),
        (["extract", "x", "--cache", "y", "--quality", "defualt"], "default"),
        (["extract", "x", "--cache", "y", "--qualty", "default"], "--quality"),
    ],
)
def test_mistyped_words_name_the_nearest(tec: Run, args: list[str], near: str) -> None:
    ran = tec(*args)
    assert ran.code == 2
    assert ran.out == ""
    assert near in ran.err
    error = tec(*args, "--json").json["error"]
    assert error["exit_code"] == 2
    assert near in error["what"] + error["todo"]


def test_a_mistyped_key_of_a_settings_file_names_the_nearest(tec: Run, tmp_path: Path, small: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('jpeg_qualty = 80\nbase = "mae"\n')
    command = extract_args(small, tmp_path / "cache", None, "--config", file)
    ran = tec(*command)
    assert ran.code == 2
    assert "unknown setting 'jpeg_qualty' (did you mean jpeg_quality" in ran.err
    assert f"where: {file}" in ran.err
    assert "jpeg_quality" in tec(*command, "--json").json["error"]["what"]
    assert not (tmp_path / "cache").exists()


def test_a_settings_file_counts_below_the_command_line(tec: Run, tmp_path: Path, small: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("views = 3\nsize = 48\nscale = [0.5, 1.0]\njpeg-quality = 70\nviews-only = true\n")
    ran = tec("extract", small, "--cache", tmp_path / "c", "--config", file, "--size", 32, "--quiet")
    assert ran.code == 0, ran.err
    cache = open_cache(tmp_path / "c")
    assert (cache.num_views, cache.size, cache.identity["jpeg"]["quality"]) == (3, 32, 70)
    assert cache.identity["views"]["scale"] == [0.5, 1.0]


@pytest.mark.parametrize(
    "text",
    [
        'views = "three"',
        "views = 2.5",
        "flip = [1, 2]",
        'scale = "half"',
        "scale = [0.5]",
        "quality = 3",
        "quality = [0.04, 0.03]",
        'quality = "int8"',
        'part = "0/2"',
        "part = 1",
        "views_only = 'no'",
        "k = 2.5",
        "[extract]\nviews = 2",
        "views = ",
    ],
)
def test_a_settings_file_with_values_of_another_kind(tec: Run, tmp_path: Path, small: Path, text: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text + "\n")
    ran = tec("extract", small, "--cache", tmp_path / "c", *SMALL, "--views-only", "--config", file)
    assert ran.code == 2, ran.err
    assert "bug in tec-cache" not in ran.err
    assert not (tmp_path / "c").exists()


def test_a_settings_file_that_is_not_text(tec: Run, tmp_path: Path, small: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes(b"views = 3 # \xff\xfe\n")
    ran = tec(*extract_args(small, tmp_path / "c", None, "--config", file))
    assert ran.code == 2, ran.err
    assert str(file) in ran.err


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["extract"], 2),
        (["extract", "x"], 2),
        (["extract", "--cache", "{tmp}/none"], 2),
        (["extract", "{tmp}/none", "--cache", "{tmp}/c"], 2),
        (["extract", "{tmp}/none", "--cache", "{tmp}/c", "--views-only"], 1),
        (["extract", "{tmp}/none-*.tar", "--cache", "{tmp}/c", "--views-only"], 1),
        (["extract", "{small}", "--cache", "{tmp}/c", "--views-only", "--views", "0"], 2),
        (["extract", "{small}", "--cache", "{tmp}/c", "--views-only", "--views", "many"], 2),
        (["extract", "{small}", "--cache", "{tmp}/c", "--views-only", "--scale", "0.5", "0.1"], 2),
        (["extract", "{small}", "--cache", "{tmp}/c", "--views-only", "--config", "{tmp}/none.toml"], 2),
        (["extract", "{small}", "--cache", "{tmp}/c", "--base", "mae", "--k", "some"], 2),
        (["extract", "{small}", "--cache", "{tmp}/c", "--base", "mae", "--quality", "0.04"], 2),
        (["extract", "{small}", "--cache", "{tmp}/c", "--base", "mae", "--part", "3/2"], 2),
        (["extract", "{small}", "--cache", "{tmp}/c", "--views-only", "--part", "²/3"], 2),
        (["fit", "{small}", "--cache", "{tmp}/c"], 2),
        (["fit", "--cache", "{tmp}/c"], 2),
        (["extract", "{small}", "--cache", "{tmp}/c", "--base", "ibot"], 1),
        (["extract", "{small}", "--cache", "{tmp}/c", "--name", "nothing"], 2),
        (["extract", "{small}", "--cache", "{tmp}/c", "--name", "a/b", "--base", "mae"], 2),
        (["info", "{tmp}"], 2),
        (["info", "{tmp}/none"], 2),
        (["train", "--cache", "{tmp}", "--run", "{tmp}/run"], 2),
        (["export", "{tmp}", "{tmp}/out"], 1),
        (["probe", "mae"], 2),
    ],
)
def test_errors_are_text_or_exactly_one_json_object(
    tec: Run, tmp_path: Path, small: Path, args: list[str], code: int
) -> None:
    filled = [arg.format(tmp=tmp_path, small=small) for arg in args]
    ran = tec(*filled)
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert ran.err
    assert "bug in tec-cache" not in ran.err
    told = tec(*filled, "--json")
    assert told.code == code
    assert set(told.json) == {"error"}
    assert set(told.json["error"]) == {"what", "where", "todo", "exit_code"}
    assert told.json["error"]["exit_code"] == code
    assert told.json["error"]["what"]
    assert told.err == ""


def test_a_bug_is_one_json_object_too(tec: Run, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr("pipelines.extract.prepare_cache", fail)
    command = extract_args(small, tmp_path / "c", None)
    ran = tec(*command)
    assert ran.code == 1
    assert "RuntimeError: oh" in ran.err
    assert "--debug" in ran.err
    assert tec(*command, "--json").json["error"]["what"] == "RuntimeError: oh"


def test_debug_shows_the_traceback(tec: Run, tmp_path: Path) -> None:
    ran = tec("extract", tmp_path / "none", "--cache", tmp_path / "c", "--views-only", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "open_source" in ran.err
    assert "error: there is no such file or folder" in ran.err
    told = tec("extract", tmp_path / "none", "--cache", tmp_path / "c", "--views-only", "--debug", "--json")
    assert told.json["error"]["exit_code"] == 1
