"""Stage one: one answer however it is run, resumable, growing by target sets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines.extraction.make_targets
import pipelines.extraction.make_views
import tec_cache.cache.lock
from pipelines.extract import extract
from pipelines.verify import verify
from tec_cache.base.model import FrozenBase
from tec_cache.cache import blocks, layout
from tec_cache.cache.lock import cache_lock
from tec_cache.cache.opening import open_cache
from tec_cache.cache.remove import clear_leftovers
from tec_cache.config import ExtractConfig
from tec_cache.distributed import Ranks
from tec_cache.errors import CacheError, ConfigError, IdentityError, NonFiniteError, TecCacheError
from tec_cache.store import open_store
from tec_cache.types import Targets
from tests.conftest import files_below, payload_of, tiny_config, write_shards, write_tiny_base
from tests.launch import SCRIPTS, options


def test_a_second_run_changes_nothing(made_cache: Path, shards: Path, tiny_base: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in made_cache.rglob("*") if p.is_file()}
    summary = extract(tiny_config(shards, made_cache, tiny_base))
    assert (summary.views_made, summary.targets_made, summary.missing) == (0, 0, 0)
    assert (summary.photos, summary.num_views) == (97, 2)
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in made_cache.rglob("*") if p.is_file()}


def test_a_run_that_was_killed_goes_on_to_the_same_files(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at every third commit, again and again, until it is done."""
    config = tiny_config(shards, tmp_path / "c", tiny_base)
    commits = {"commit_views": 0, "commit_targets": 0}

    def mortal(module: Any, name: str) -> Any:
        inner = getattr(module, name)

        def commit(*args: Any, **options: Any) -> Any:
            commits[name] += 1
            if commits[name] % 3 == 0:
                raise KeyboardInterrupt
            return inner(*args, **options)

        return commit

    for module, name in (
        (pipelines.extraction.make_views, "commit_views"),
        (pipelines.extraction.make_targets, "commit_targets"),
    ):
        monkeypatch.setattr(module, name, mortal(module, name))
    deaths = 0
    while True:
        try:
            extract(config)
            break
        except KeyboardInterrupt:
            deaths += 1
    assert deaths >= 7  # of each kind of commit; both may die in one run
    assert files_below(tmp_path / "c") == files_below(made_cache)


def test_a_cache_begun_by_a_release_with_another_compression_is_finished(
    coded_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Level 7 was the first releases': how hard was compressed is no part of what a target set is."""
    config = tiny_config(shards, tmp_path / "c", tiny_base, quality="default")
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "ZSTD_LEVEL", 7)
        extract(replace(config, part="1/2"))
    extract(config)
    assert not verify(str(tmp_path / "c"), full=True).findings
    ours, theirs = open_cache(tmp_path / "c"), open_cache(coded_cache)
    assert (ours["tiny"].fingerprint, ours["tiny"].units) == (theirs["tiny"].fingerprint, theirs["tiny"].units)
    other = 0
    for unit in ours["tiny"].units:
        records = [cache["tiny"].record(unit) for cache in (ours, theirs)]
        other += records[0] != records[1]
        read = [cache["tiny"].read_unit(record) for cache, record in zip((ours, theirs), records, strict=True)]
        assert all((read[0][name] == values).all() for name, values in read[1].items())
    assert 0 < other < len(ours["tiny"].units)


def test_leftovers_of_a_kill_are_removed_and_never_read(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    opened = open_cache(cache)
    unit, whole = opened.view_units[0], opened.view_units[1]
    left = []
    for target, record in (("", layout.views_record(unit)), ("tiny", layout.target_record("tiny", unit))):
        # the payload of a unit whose record was never written: half of it, so that reading it would be an error
        ours = payload_of(open_cache(made_cache), unit, target or None)
        path = cache / ours.relative_to(made_cache)
        path.unlink()
        left.append(path.with_name(path.name.replace(path.name.split(".")[-2], "0" * 16)))
        left[-1].write_bytes(ours.read_bytes()[:1000])
        (cache / record).unlink()
        # what another job made of a unit that was there already
        ours = payload_of(opened, whole, target or None)
        left.append(ours.with_name(ours.name.replace(ours.name.split(".")[-2], "f" * 16)))
        left[-1].write_bytes(b"rubbish")
    left.append(cache / layout.codec_payload("tiny", "0" * 64))
    left[-1].write_bytes(b"parameters of a fit that lost")
    (cache / ".drafts").mkdir(exist_ok=True)
    left += [cache / ".drafts" / "0123456789ab", cache / ".drafts" / ".000000.000-v00.json.0123456789ab.tmp"]
    for path in left[-2:]:
        path.write_bytes(b"half of something")
    # a folder of somebody else's is left alone, wherever it is
    mine = [cache / n for n in ("notes.txt", "views/notes.tar", "targets/tiny/notes.zip", "targets/mine/plan.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    fresh = open_cache(cache)
    assert unit not in fresh.view_unit_set
    assert unit not in fresh["tiny"].units
    assert fresh.missing_units(2, "tiny") == [unit]
    extract(tiny_config(shards, cache, tiny_base))
    assert not any(path.exists() for path in left)
    assert [path.read_text() for path in mine] == ["mine"] * 4
    for path in mine:
        path.unlink()
    assert files_below(cache) == files_below(made_cache)


def test_leftovers_are_named_and_what_is_recorded_is_none(made_cache: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    assert clear_leftovers(open_store(cache)) == []
    unit = open_cache(cache).view_units[3]
    name = layout.views_payload(unit, "0" * 64)
    (cache / name).write_bytes(b"")
    assert clear_leftovers(open_store(cache)) == [name]
    assert files_below(cache) == files_below(made_cache)


def test_leftovers_stay_while_another_job_may_still_need_them(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """A payload whose record is about to be written looks like one that was left behind."""
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    name = layout.views_payload(open_cache(cache).view_units[3], "0" * 64)
    (cache / name).write_bytes(b"just put")
    with another_job(cache, "share"):
        extract(tiny_config(shards, cache, tiny_base))
        assert (cache / name).exists()
    extract(tiny_config(shards, cache, tiny_base))
    assert not (cache / name).exists()


def test_a_second_target_set_needs_no_photos(made_cache: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    before = files_below(cache)
    other = write_tiny_base(tmp_path / "other", seed=1, embed_dim=96, num_heads=6)
    summary = extract(tiny_config(None, cache, other, quality="0.05,0.04", k="5"))
    assert (summary.views_made, summary.targets_made) == (0, 194)
    after = files_below(cache)
    assert {n: after[n] for n in before} == before
    opened = open_cache(cache)
    assert opened.target_names == ["other", "tiny"]
    other_set = opened["other"]
    assert (other_set.spec.channels, other_set.spec.num_rows, other_set.codec.name) == (96, 6, "transform")
    assert (opened["tiny"].codec.name, opened["tiny"].identity["codec"]) == ("fp16", {"name": "exact"})
    # going on needs neither the settings nor the base's name repeated
    again = extract(tiny_config(None, cache, None, name="other"))
    assert (again.targets_made, again.quality) == (0, "0.05,0.04")
    assert files_below(cache) == after


def test_views_only_then_targets_is_the_same_as_both_at_once(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "c"
    extract(tiny_config(shards, cache, None, views_only=True))
    assert not (cache / "targets").exists()
    extract(tiny_config(None, cache, tiny_base))
    assert files_below(cache) == files_below(made_cache)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"size": 40}, "views.size"), ({"seed": 1}, "views.seed"), ({"grid": 2}, "grid"), ({"flip": 0.0}, "views.flip"),
     ({"jpeg_quality": 80}, "jpeg.quality"), ({"scale": (0.5, 1.0)}, "views.scale"), ({"group_size": 8}, "group_size"),
     ({"limit": 50}, "source.limit"), ({"k": "2"}, "spec.k"), ({"k": "none"}, "spec.k"),
     ({"quality": "default"}, "codec.name"), ({"quality": "0.05,0.04"}, "codec.mse"),
     ({"normalization": "none"}, "spec.normalization"), ({"last_layers": 1}, "last_layers"),
     ({"batch_size": 4}, "batch_size"), ({"threads": 2}, "threads"), ({"precision": "bfloat16"}, "precision")],
)  # fmt: skip
@pytest.mark.parametrize("dry_run", [False, True])
def test_other_settings_are_refused_by_field(
    made_cache: Path, shards: Path, tiny_base: Path, changes: dict[str, Any], field: str, dry_run: bool
) -> None:
    before = files_below(made_cache)
    with pytest.raises(IdentityError, match=field.replace(".", r"\.")) as error:
        extract(tiny_config(shards, made_cache, tiny_base, **changes), dry_run=dry_run)
    assert error.value.exit_code == 2
    assert files_below(made_cache) == before


def test_other_weights_and_other_photos_are_refused(made_cache: Path, shards: Path, tmp_path: Path) -> None:
    other = write_tiny_base(tmp_path / "tiny", seed=7)
    with pytest.raises(IdentityError, match="weights_sha256"):
        extract(tiny_config(shards, made_cache, other))
    photos = write_shards(tmp_path / "photos", [40, 24, 34])
    with pytest.raises(IdentityError, match=r"shard-000002\.tar has changed"):
        extract(tiny_config(photos, made_cache, other))


def test_overwrite_replaces_a_target_set_and_leaves_the_views(
    made_cache: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    views = files_below(cache / "views")
    (cache / "targets" / "tiny" / "notes.txt").write_text("mine")
    extract(tiny_config(None, cache, tiny_base, k="2"), overwrite=True)
    assert open_cache(cache)["tiny"].spec.k == 2
    assert files_below(cache / "views") == views
    assert (cache / "targets" / "tiny" / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_a_cache_but_nothing_of_the_users(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    mine = [cache / name for name in ("notes.txt", "views/notes.txt", "targets/tiny/notes.txt")]
    for path in mine:
        path.write_text("mine")
    extract(tiny_config(shards, cache, tiny_base, seed=9), overwrite=True)
    assert open_cache(cache).identity["views"]["seed"] == 9
    assert [path.read_text() for path in mine] == ["mine"] * 3
    fresh = tmp_path / "fresh"
    extract(tiny_config(shards, fresh, tiny_base, seed=9))
    for path in mine:
        path.unlink()
    assert files_below(cache) == files_below(fresh)
    with pytest.raises(ConfigError, match="several processes"):
        extract(tiny_config(shards, cache, tiny_base, seed=8), overwrite=True, ranks=Ranks(0, 0, 2))


def test_dry_run_writes_nothing(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    summary = extract(tiny_config(shards, tmp_path / "c", tiny_base), dry_run=True)
    assert not (tmp_path / "c").exists()
    assert (summary.shards_left, summary.missing) == (3, 3)
    assert summary.free_disk > 0


@pytest.mark.parametrize(("fitted", "key", "where"), [(True, "p00010", "unit 000000.000-v00"), (False, None, "sample")])
def test_a_target_that_is_not_finite_names_the_sample(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitted: bool, key: str, where: str
) -> None:
    """The base of the second batch gives a NaN for its third view: of the first unit, or of the views of the fit."""
    cache = tmp_path / "c"
    extract(tiny_config(shards, cache, None, views_only=True))
    if fitted:
        extract(tiny_config(None, cache, tiny_base), fit_only=True)
    forward, calls = FrozenBase.forward, [0]

    def spoiled(self: FrozenBase, images: torch.Tensor) -> Targets:
        targets = forward(self, images)
        calls[0] += 1
        if calls[0] == 2:
            targets.features[2, 0, 0] = float("nan")
        return targets

    monkeypatch.setattr(FrozenBase, "forward", spoiled)
    with pytest.raises(NonFiniteError, match=r"not finite for 'p000\d\d'") as error:
        extract(tiny_config(None, cache, tiny_base))
    if key:
        assert f"'{key}'" in error.value.what
    assert where in error.value.where
    assert not open_cache(cache)["tiny"].units
    monkeypatch.undo()
    assert extract(tiny_config(None, cache, tiny_base)).missing == 0


def test_all_rows_no_rows_and_class_row_only(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    extract(tiny_config(shards, cache, None, views_only=True, views=1))
    for k, rows in (("all", 17), ("none", 0), ("0", 1)):
        extract(tiny_config(None, cache, tiny_base, k=k, name=f"k-{k}"))
        tiny = open_cache(cache)[f"k-{k}"]
        assert tiny.spec.num_rows == rows
        arrays = tiny.read_unit(tiny.record(open_cache(cache).view_units[0]))
        assert set(arrays) == ({"features"} if k == "none" else {"features", "attention"})


def test_what_cannot_be_done_is_said(shards: Path, tiny_base: Path, tmp_path: Path, made_cache: Path) -> None:
    with pytest.raises(ConfigError, match="no cache here yet"):
        extract(tiny_config(None, tmp_path / "none", tiny_base))
    with pytest.raises(ConfigError, match="no base was named"):
        extract(tiny_config(shards, tmp_path / "none", None))
    with pytest.raises(ConfigError, match="all views of a centre crop"):
        extract(tiny_config(shards, tmp_path / "none", tiny_base, crop="center"))
    with pytest.raises(ConfigError, match="give the photos to add views"):
        extract(tiny_config(None, made_cache, tiny_base, views=3))
    with pytest.raises(ConfigError, match="cannot name a target set"):
        extract(tiny_config(None, made_cache, tiny_base, name="../x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(TecCacheError, match="cannot be written"):
        extract(tiny_config(shards, tmp_path / "file" / "c", tiny_base))


def test_targets_wait_for_whole_views(made_cache: Path, tiny_base: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    (cache / layout.source_record(1)).unlink()
    with pytest.raises(CacheError, match="missing"):
        extract(tiny_config(None, cache, tiny_base))


def test_few_shards_are_shared_by_group_and_many_by_shard() -> None:
    two = [Ranks(r, r, 2) for r in range(2)]
    assert [[r.owns(0, g, 1) for g in range(4)] for r in two] == [
        [True, False, True, False],
        [False, True, False, True],
    ]
    assert [[r.owns(s, 0, 8) for s in range(4)] for r in two] == [
        [True, False, True, False],
        [False, True, False, True],
    ]
    assert all(r.owns(3, g, 8) == (r.rank == 1) for r in two for g in range(5))


def test_summary_is_plain_json(made_cache: Path, shards: Path, tiny_base: Path) -> None:
    assert json.loads(json.dumps(extract(tiny_config(shards, made_cache, tiny_base)).to_json()))["photos"] == 97


@contextmanager
def another_job(cache: Path, hold: str) -> Iterator[None]:
    """Another process that holds the cache: `share` as a writer, `own` as one that removes."""
    code = (
        "import sys; from tec_cache.cache.lock import cache_lock; from tec_cache.store import open_store\n"
        "with cache_lock(open_store(sys.argv[1])) as lock:\n"
        "    getattr(lock, sys.argv[2])(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(cache), hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield
        finally:
            other.stdin.close()


def test_nothing_is_removed_while_another_job_writes(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    replacing = [tiny_config(shards, cache, tiny_base, seed=9), tiny_config(None, cache, tiny_base, k="2")]
    with another_job(cache, "share"):
        for config in replacing:
            with pytest.raises(TecCacheError, match="another job is writing to this cache") as error:
                extract(config, overwrite=True)
            assert error.value.where == str(cache)
            assert "wait until it is done" in error.value.todo
        assert files_below(cache) == files_below(made_cache)
        # writing beside it is no harm, and training asks for no lock
        extract(tiny_config(shards, cache, tiny_base, views=3))
    for config in replacing[::-1]:
        extract(config, overwrite=True)
    assert open_cache(cache).identity["views"]["seed"] == 9


def test_nothing_is_written_while_another_job_removes(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tec_cache.cache.lock, "PATIENCE", 0.2)
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    with another_job(cache, "own"):
        with pytest.raises(TecCacheError, match="another job is removing"):
            extract(tiny_config(shards, cache, tiny_base, views=3))
        extract(tiny_config(shards, cache, tiny_base, views=3), dry_run=True)
        assert files_below(cache) == files_below(made_cache)
    extract(tiny_config(shards, cache, tiny_base, views=3))


def test_a_job_waits_while_another_one_clears_up(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Every job has the cache alone for a moment, at its beginning and end; the others must not fail for it."""
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    holding = another_job(cache, "own")
    holding.__enter__()
    timer = threading.Timer(0.5, lambda: holding.__exit__(None, None, None))
    timer.start()
    assert extract(tiny_config(shards, cache, tiny_base)).missing == 0
    timer.join()


def test_a_refused_extraction_leaves_nothing_behind(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    for cache in (tmp_path / "new" / "folder" / "cache", tmp_path / "theirs"):
        with pytest.raises(ConfigError, match="no base was named"):
            extract(tiny_config(shards, cache, None))
    assert [(path.name, list(path.iterdir())) for path in tmp_path.iterdir()] == [("theirs", [])]


def test_a_base_that_cannot_be_loaded_leaves_nothing_behind(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Where weights cannot be had that is known only once the cache is begun."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TecCacheError):
        extract(tiny_config(shards, tmp_path / "cache", base))
    assert not (tmp_path / "cache").exists()
    extract(tiny_config(shards, tmp_path / "cache", None, views_only=True))
    before = files_below(tmp_path / "cache")
    with pytest.raises(TecCacheError):
        extract(tiny_config(shards, tmp_path / "cache", base))
    assert files_below(tmp_path / "cache") == before


def test_a_refused_job_leaves_the_lock_that_another_one_holds(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with another_job(cache, "share"):
        with pytest.raises(ConfigError), cache_lock(open_store(cache)):
            raise ConfigError("nothing to do")
        assert [path.name for path in cache.iterdir()] == [layout.LOCK]


def test_a_lock_that_was_taken_away_before_it_was_held_is_made_again(tmp_path: Path) -> None:
    """Its holder would be alone with a file that nobody else can find."""
    cache = tmp_path / "cache"
    code = (
        "import sys; from tec_cache.cache.lock import cache_lock; from tec_cache.store import open_store\n"
        "with cache_lock(open_store(sys.argv[1])) as lock: print(lock.try_own())"
    )
    with cache_lock(open_store(cache)) as lock:
        (cache / layout.LOCK).unlink()
        cache.rmdir()
        lock.share()
        other = subprocess.run([sys.executable, "-c", code, str(cache)], capture_output=True, text=True, check=True)
    assert other.stdout == "False\n"


def test_jobs_that_do_the_same_at_once_give_the_undisturbed_cache(
    coded_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Jobs that know nothing of each other, each with all units as its work, the fit of the codec too."""
    config = tiny_config(shards, tmp_path / "c", tiny_base, quality="default")
    command = [str(SCRIPTS / "tec-cache"), "extract", *options(config), "--json"]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(*job.communicate(timeout=120), job.returncode) for job in jobs]
    for out, err, code in ended:
        assert (code, err) == (0, "")
        assert json.loads(out)["missing"] == 0
    extract(config)  # whatever the losers left is cleared
    assert files_below(tmp_path / "c") == files_below(coded_cache)


def test_a_base_without_a_class_token_says_what_row_0_is(
    made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    base = write_tiny_base(tmp_path / "gap", class_token=False, global_pool="avg", fc_norm=False)
    summary = extract(tiny_config(None, cache, base))
    assert "mean query" in summary.first_row
    assert "mean query" in open_cache(cache)["gap"].manifest["notes"]["first_row"]


def test_overwrite_with_photos_keeps_the_views_when_only_the_targets_differ(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """The refusal says "or --overwrite"; following it literally must not cost the views or another set."""
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    extract(tiny_config(None, cache, tiny_base, name="another"))
    kept = {n: d for n, d in files_below(cache).items() if "tiny" not in n}
    config = ExtractConfig(input=str(shards), cache=str(cache), base=str(tiny_base), quality="small", device="cpu")
    with pytest.raises(IdentityError, match=r"codec\.name"):
        extract(config)
    dry = extract(config, overwrite=True, dry_run=True)
    assert (dry.missing, dry.to_remove) == (16, 16), "what would be lost and made again is said before"
    extract(config, overwrite=True)
    after = files_below(cache)
    assert {n: after[n] for n in kept} == kept
    assert open_cache(cache)["tiny"].identity["codec"]["mse"] == 0.1
    assert open_cache(cache)["another"].identity["codec"] == {"name": "exact"}


def test_overwrite_removes_nothing_for_a_command_that_cannot_be_carried_out(
    made_cache: Path, shards: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    before = files_below(cache)
    for config in (
        tiny_config(shards, cache, tmp_path / "nowhere", size=16),
        tiny_config(None, cache, tmp_path / "nowhere", name="tiny"),
    ):
        with pytest.raises(ConfigError, match="unknown base"):
            extract(config, overwrite=True)
        assert files_below(cache) == before


def test_dry_run_of_overwrite_says_what_would_be_left_to_do(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    before = files_below(made_cache)
    summary = extract(tiny_config(shards, made_cache, tiny_base, seed=5), overwrite=True, dry_run=True)
    assert (summary.photos, summary.shards_left) == (0, 3)
    assert files_below(made_cache) == before
