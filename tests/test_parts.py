"""Work divided among independent jobs: every unit once, in any order, the same cache."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import cli
from pipelines.extract import extract
from tec_cache.cache.opening import open_cache
from tec_cache.config import parse_part
from tec_cache.distributed import Ranks
from tec_cache.errors import CacheError, ConfigError
from tests.conftest import files_below, tiny_config
from tests.launch import SCRIPTS, options, torchrun


@pytest.mark.parametrize(
    ("quality", "order"), [("exact", (2, 3, 1)), ("default", (1, 2, 3)), ("default", (3, 1, 2))], ids=str
)
def test_parts_one_after_the_other_are_one_run(
    quality: str, order: tuple[int, ...], shards: Path, tiny_base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The codec comes out the same although the first part fits it when two thirds of the views are not cut yet."""
    whole = request.getfixturevalue("made_cache" if quality == "exact" else "coded_cache")
    made = views = 0
    for done, part in enumerate(order, 1):
        config = tiny_config(shards, tmp_path / "c", tiny_base, quality=quality, part=f"{part}/3")
        summary = extract(config)
        assert summary.views_made == summary.targets_made > 0
        made, views = made + summary.targets_made, views + summary.views_made
        assert (summary.missing == 0) == (done == 3)
        fitted = (tmp_path / "c" / "targets" / "tiny" / "codec.json").read_bytes()
        assert fitted == (whole / "targets" / "tiny" / "codec.json").read_bytes()
    assert made == views == 194
    assert files_below(tmp_path / "c") == files_below(whole)


def test_parts_at_once_are_one_run(coded_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Both fit the codec, and one of them commits it."""
    config = tiny_config(shards, tmp_path / "c", tiny_base, quality="default")
    command = [str(SCRIPTS / "tec-cache"), "extract", *options(config), "--json", "--part"]
    jobs = [
        subprocess.Popen([*command, f"{part}/2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for part in (1, 2)
    ]
    ended = [(*job.communicate(timeout=120), job.returncode) for job in jobs]
    assert [(err, code) for _, err, code in ended] == [("", 0)] * 2
    assert sum(json.loads(out)["targets_made"] for out, _, _ in ended) == 194
    assert files_below(tmp_path / "c") == files_below(coded_cache)


def test_a_part_of_several_ranks(made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """--part beside torchrun: two ranks of one part and the single one of the other do every unit once."""
    config = tiny_config(shards, tmp_path / "c", tiny_base)
    part = ("tec-cache", "extract", *options(config), "--part", "2/2", "--json")
    ran = torchrun(tmp_path / "log", 2, "--no-python", *part)
    assert ran.process.returncode == 0, ran.err
    (line,) = ran.out.strip().splitlines()
    assert json.loads(line)["targets_made"] > 0, "rank 0 counts its own"
    there = {str(unit) for unit in open_cache(tmp_path / "c")["tiny"].units}
    second = [Ranks(rank, rank, 2).with_part((1, 2)) for rank in range(2)]
    assert there == {
        str(unit)
        for unit in open_cache(made_cache).view_units
        if any(r.owns(unit.shard, unit.group, 3) for r in second)
    }
    # the other part is one of another number of ranks: it finds what is done and does its own
    extract(tiny_config(shards, tmp_path / "c", tiny_base, part="1/2"))
    assert len(open_cache(tmp_path / "c")["tiny"].units) >= len(there)
    assert extract(config).missing == 0
    assert files_below(tmp_path / "c") == files_below(made_cache)


def test_more_parts_than_units(made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    counts = [
        extract(tiny_config(shards, tmp_path / "c", tiny_base, part=f"{i}/12")).targets_made for i in range(1, 13)
    ]
    assert 0 in counts
    assert sum(counts) == 194
    assert files_below(tmp_path / "c") == files_below(made_cache)


def test_a_part_of_targets_over_views_that_are_there(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    extract(tiny_config(shards, tmp_path / "c", None, views_only=True))
    for part in ("2/2", "1/2"):
        extract(tiny_config(None, tmp_path / "c", tiny_base, part=part))
    assert files_below(tmp_path / "c") == files_below(made_cache)


def test_targets_of_a_part_wait_for_views_of_all_parts(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    extract(tiny_config(shards, tmp_path / "c", None, views_only=True, part="1/2"))
    with pytest.raises(CacheError, match="units are missing"):
        extract(tiny_config(None, tmp_path / "c", tiny_base, part="1/2"))
    extract(tiny_config(shards, tmp_path / "c", None, views_only=True, part="2/2"))
    extract(tiny_config(None, tmp_path / "c", tiny_base))
    assert not open_cache(tmp_path / "c").missing_units(2, "tiny")


@pytest.mark.parametrize(("parts", "ranks"), list(itertools.product((1, 2, 3, 5), (1, 2, 4))))
@pytest.mark.parametrize("num_shards", [1, 3, 7, 16, 81])
def test_parts_and_ranks_cover_every_unit_exactly_once(parts: int, ranks: int, num_shards: int) -> None:
    workers = [Ranks(rank, rank, ranks).with_part((part, parts)) for part in range(parts) for rank in range(ranks)]
    owners = Counter(
        (shard, group) for worker in workers for shard in range(num_shards) for group in range(6)
        if worker.owns(shard, group, num_shards)
    )  # fmt: skip
    assert owners == Counter({(shard, group): 1 for shard in range(num_shards) for group in range(6)})
    assert [worker.alone for worker in workers] == [parts * ranks == 1] * len(workers)
    if num_shards >= 4 * parts * ranks:
        loads = [sum(worker.owns(shard, 0, num_shards) for shard in range(num_shards)) for worker in workers]
        assert max(loads) - min(loads) <= 1


def test_part_texts() -> None:
    assert parse_part(None) == (0, 1)
    assert parse_part("1/1") == (0, 1)
    assert parse_part("16/16") == (15, 16)
    bad = ["", "/", "1", "0/2", "3/2", "-1/2", "1/-2", "1/0", "0/0", "1/2/3", "a/b", "1.0/2", " ", "²/3", "1/٣", "1 /2"]
    for text in bad:
        with pytest.raises(ConfigError, match="--part") as error:
            parse_part(text)
        assert "3/16" in error.value.todo


def test_the_command_line_says_what_other_parts_still_owe(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tec-cache", "extract", str(shards), "--cache", str(tmp_path / "c"), "--views-only", "--size", "32"]
    command += ["--grid", "4", "--views", "1", "--group-size", "16", "--quiet", "--part"]
    for part, code, said in (("1/2", 0, True), ("2/2", 0, False), ("3/2", 2, False)):
        monkeypatch.setattr("sys.argv", [*command, part])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert int(stop.value.code or 0) == code
        out, err = capsys.readouterr()
        assert ("still to be finished by them" in out) == said
        assert (f"--part {part}" in err) == (code == 2)
