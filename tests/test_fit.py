"""The codec of a target set: fitted once, on a sample that is the same however much of the cache is there."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import cli
import pipelines.extraction.fit
from pipelines.extract import extract
from pipelines.extraction.prepare_views import ViewJob, prepare_cache
from pipelines.extraction.sample import Sample, sample_crops
from pipelines.info import info
from tec_cache.cache import layout
from tec_cache.cache.lock import cache_lock
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.codec.errors import TargetErrors
from tec_cache.config import ExtractConfig
from tec_cache.distributed import Ranks
from tec_cache.errors import CacheError, ConfigError, SourceError
from tec_cache.store import open_store
from tests.conftest import encoded, files_below, photo, tiny_config, write_shards, write_tar
from tests.sealing import reseal, unsealed


def opened(config: ExtractConfig) -> tuple[Cache, ViewJob]:
    """Open or create a cache as an extraction does, without making anything."""
    store = open_store(config.cache)
    with cache_lock(store) as lock:
        return prepare_cache(config, store, dry_run=False, overwrite=False, ranks=Ranks(), lock=lock)


def sampled(config: ExtractConfig, count: int) -> list[Sample]:
    return sample_crops(*opened(config), count, on_error=config.on_error)


def views_config(source: Path, cache: Path, **changes: Any) -> ExtractConfig:
    return tiny_config(source, cache, None, **{"views_only": True, "group_size": 4, "views": 3} | changes)


# ---- the sample ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 20, 72, 97, 1000])
def test_the_sample_is_the_same_from_photos_from_a_part_and_from_the_cache(
    shards: Path, tmp_path: Path, count: int
) -> None:
    config = views_config(shards, tmp_path / "c", views=2, group_size=16)
    before = sampled(config, count)
    extract(views_config(shards, tmp_path / "c", views=2, group_size=16, part="2/3"))
    partly = sampled(config, count)
    extract(config)
    after = sampled(config, count)
    # photos cannot be read any more: only what is committed was asked
    assert before == partly == after == sample_crops(*opened(tiny_config(None, tmp_path / "c", None, name="x")), count,
                                                     on_error="stop")  # fmt: skip
    assert len(before) == len(set(before)) == min(count, 194)
    cache = open_cache(tmp_path / "c")
    stored = {
        (cache.shards[unit.shard], key, unit.view): crop
        for unit in cache.view_units
        for record in [cache.views_record(unit)]
        for key, crop in zip(record.keys, cache.read_crops(record, range(len(record.keys))), strict=True)
    }
    assert all(stored[s.shard, s.key, s.view] == s.jpeg for s in before)
    photos = Counter((s.shard, s.key) for s in before)
    assert max(photos.values()) == (1 if count <= 97 else 2), "each photo once before any twice"
    assert len(photos) == min(count, 97)
    shares = Counter(shard for shard, _ in photos).values()  # of 40, 24 and 33 photos
    assert max(shares) - min(shares) <= (1 if count <= 72 else 16), "shards give equally many as long as they can"


def broken_shards(folder: Path, whole: int, broken: int) -> Path:
    """Shards of whole photos, and between them ones that cannot be decoded or used; the last shard ends early."""
    number = 0
    for shard in range(3):
        members = []
        for _ in range(whole):
            members += [(f"p{number:04d}.jpg", encoded(photo(number % 7, 40, 30)))]
            members += [(f"p{number:04d}x{i}.jpg", b"letter") for i in range(broken // whole)]
            members += [(f"p{number:04d}y.cls", b"1"), (f"p{number:04d}z.jpg", encoded(photo(1))[:300])]
            number += 1
        write_tar(folder / f"{shard}.tar", members)
    last = folder / "2.tar"
    last.write_bytes(last.read_bytes()[:-12_000])
    return folder


@pytest.mark.parametrize(("whole", "broken", "count"), [(10, 10, 12), (10, 0, 100), (6, 120, 9), (30, 90, 6)])
def test_the_sample_leaves_out_broken_photos_and_shards_alike(
    tmp_path: Path, whole: int, broken: int, count: int
) -> None:
    """Also where most of a shard is broken: as many good photos are drawn as the cache will have."""
    source = broken_shards(tmp_path / "in", whole, broken)
    config = views_config(source, tmp_path / "c", on_error="skip", views=2)
    before = sampled(config, count)
    with pytest.raises(SourceError, match="damaged shard"):
        sampled(views_config(source, tmp_path / "c", on_error="stop", views=2), count)
    extract(config)
    assert sampled(config, count) == before
    good = sum(len(open_cache(tmp_path / "c").views_record(u).keys) for u in open_cache(tmp_path / "c").view_units)
    assert len(before) == min(count, good)


def test_shards_sorted_by_class_give_all_classes(tmp_path: Path) -> None:
    """One class a shard, of very different sizes: each shard gives equally many views as far as it can."""
    counts = [30, 3, 9, 30, 14]
    write_shards(tmp_path / "in", counts)
    samples = sampled(views_config(tmp_path / "in", tmp_path / "c"), 25)
    found = Counter(shard for shard, _ in {(sample.shard, sample.key) for sample in samples})
    assert found.pop("shard-000001.tar") == 3
    assert sorted(found.values()) == [5, 5, 6, 6]


def test_another_seed_draws_others_and_a_limit_is_kept(shards: Path, tmp_path: Path) -> None:
    one = sampled(views_config(shards, tmp_path / "a"), 20)
    other = sampled(views_config(shards, tmp_path / "b", seed=1), 20)
    assert {(s.shard, s.key) for s in one} != {(s.shard, s.key) for s in other}
    few = sampled(views_config(shards, tmp_path / "few", limit=10), 20)
    assert {s.key for s in few} == {f"p{i:05d}" for i in range(10)}
    assert len(few) == 20


# ---- fit and check -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_photos", "num_views", "fit_views"), [(97, 1, 40), (97, 4, 512), (5, 3, 512), (2, 1, 512)]
)
def test_views_of_the_fit_and_of_the_check_share_no_photo(
    tmp_path: Path, shards: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch,
    num_photos: int, num_views: int, fit_views: int,
) -> None:  # fmt: skip
    seen: list[list[str]] = []
    inner = pipelines.extraction.fit.targets_of_crops

    def remember(job: Any, crops: Any, keys: Any, pool: ThreadPoolExecutor) -> Any:
        seen.append(list(keys))
        return inner(job, crops, keys, pool)

    monkeypatch.setattr(pipelines.extraction.fit, "targets_of_crops", remember)
    config = tiny_config(
        shards, tmp_path / "c", tiny_base, quality="0.2,0.15", views=num_views, fit_views=fit_views, limit=num_photos
    )
    extract(config, fit_only=True)
    fit, check = seen
    assert fit
    assert check
    assert not set(fit) & set(check)
    record = open_cache(tmp_path / "c")["tiny"].codec_record
    assert (record.fitted_views, record.checked_views) == (len(fit), len(check))
    assert len(fit) + len(check) == min(num_photos * num_views, fit_views + min(128, fit_views // 4))
    assert len(check) == pytest.approx(len(fit) / 4, rel=0.3, abs=3)
    assert not open_cache(tmp_path / "c").view_units, "fit writes no views"
    monkeypatch.undo()
    fitted = files_below(tmp_path / "c" / "targets")
    extract(config)
    assert {n: d for n, d in files_below(tmp_path / "c" / "targets").items() if n in fitted} == fitted


def test_a_rank_whose_first_one_never_comes_fits_by_itself(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks need not be torchrun's: whoever starts them may lose one."""
    monkeypatch.setattr(pipelines.extraction.fit, "PATIENCE", 0.01)
    monkeypatch.setattr(pipelines.extraction.fit, "PAUSE", 0.001)
    config = tiny_config(shards, tmp_path / "c", tiny_base, quality="default")
    extract(config, ranks=Ranks(rank=1, local_rank=1, world_size=2, local_world_size=2))
    assert "rank 1 fits the codec: no other one has in" in capsys.readouterr().err
    assert open_cache(tmp_path / "c")["tiny"].fitted
    # the codec is there now: nobody waits, nobody fits
    monkeypatch.setattr(pipelines.extraction.fit, "sample_crops", None)
    extract(config)


def test_a_single_photo_cannot_be_fitted_and_measured(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path / "c", tiny_base, quality="default", limit=1)
    with pytest.raises(ConfigError, match="at least two photos") as error:
        extract(config)
    assert "--quality exact" in error.value.todo
    assert extract(tiny_config(shards, tmp_path / "c", tiny_base, limit=1)).missing == 0


def test_photos_that_are_all_broken_are_named_before_a_fit_that_lacks_them(tmp_path: Path, tiny_base: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", [("bad.jpg", b"letter"), ("p.jpg", encoded(photo(1)))])
    config = tiny_config(tmp_path / "in", tmp_path / "c", tiny_base, quality="default", views=1)
    with pytest.raises(SourceError, match="photo 'bad': not an image"):
        extract(config)
    with pytest.raises(ConfigError, match="at least two photos"):
        extract(tiny_config(tmp_path / "in", tmp_path / "c", tiny_base, quality="default", views=1, on_error="skip"))


@pytest.mark.parametrize("quality", ["exact", "default"])
def test_the_recorded_errors_are_those_of_the_stored_targets(
    quality: str, tiny_base: Path, request: pytest.FixtureRequest
) -> None:
    """Measured here on all stored views, from the exact cache as the truth; and shown by `info` and the summary."""
    import torch

    path = request.getfixturevalue("made_cache" if quality == "exact" else "coded_cache")
    exact, coded = open_cache(request.getfixturevalue("made_cache"))["tiny"], open_cache(path)["tiny"]
    errors = TargetErrors()
    for unit in exact.units:
        both = []
        for target in (exact, coded):
            arrays = target.read_unit(target.record(unit)).items()
            tensors = {n: torch.from_numpy(a.astype("int32") if a.dtype == "uint16" else a.copy()) for n, a in arrays}
            both.append(target.decode(tensors))
        assert torch.equal(both[0].rows, both[1].rows)
        errors.add(*both)
    found, said = errors.summary(), info(str(path))["targets"]["tiny"]
    assert said["quality"] == quality
    assert said["errors"] == coded.codec_record.errors
    if quality == "exact":
        assert said["asked_errors"] == {}
        assert said["errors"]["mse"] < 1e-6
        assert said["errors"]["kl"] < 1e-6
        return
    assert said["asked_errors"] == {"mse": 0.04, "kl": 0.03}
    for name, asked in said["asked_errors"].items():
        assert said["errors"][name] <= asked * 1.1
        assert found[name] == pytest.approx(said["errors"][name], rel=0.3)
    assert said["codec_bytes"] == sum(p.stat().st_size for p in path.glob("targets/tiny/codec.*.safetensors")) > 0
    assert said["bytes"] < info(str(request.getfixturevalue("made_cache")))["targets"]["tiny"]["bytes"] / 2


def test_the_errors_are_said_to_people_and_programs(
    coded_cache: Path,
    shards: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    errors = open_cache(coded_cache)["tiny"].codec_record.errors
    commands = (["info", str(coded_cache)], ["extract", "--cache", str(coded_cache), "--name", "tiny", "--quiet"])
    for command in commands:
        for more in ([], ["--json"]):
            monkeypatch.setattr("sys.argv", ["tec-cache", *command, *more])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert not stop.value.code
            out = capsys.readouterr().out
            if more:
                found = json.loads(out)
                found = found if command[0] == "extract" else found["targets"]["tiny"]
                assert (found["errors"], found["quality"]) == (errors, "default")
            else:
                assert f"relative MSE {errors['mse']:.2g}, KL {errors['kl']:.2g} nats" in out
                assert "quality" in out


# ---- a codec that is damaged, gone or another's --------------------------------------------------------------


def use(cache: Path) -> None:
    tiny = open_cache(cache)["tiny"]
    tiny.record(tiny.units[0])
    assert tiny.codec


@pytest.mark.parametrize(
    "harm",
    ["flipped", "cut", "gone", "of another set", "record gone", "record flipped", "record of another set",
     "parameters of another set", "parameters exchanged"],
)  # fmt: skip
def test_a_spoiled_codec_is_refused_by_name(
    coded_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path, harm: str
) -> None:
    cache = Path(shutil.copytree(coded_cache, tmp_path / "c"))
    record = cache / layout.codec_record("tiny")
    (path,) = cache.glob("targets/tiny/codec.*.safetensors")
    data, named, message = path.read_bytes(), path, "parameters are damaged"
    if harm == "flipped":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif harm == "cut":
        path.write_bytes(data[:-1])
    elif harm == "gone":
        path.unlink()
        message = "parameters are gone"
    elif harm == "record gone":
        record.unlink()
        named, message = record, "has no codec yet"
    elif harm == "record flipped":
        text = record.read_bytes()
        record.write_bytes(text.replace(b'"fitted_views":1', b'"fitted_views":2'))
        assert record.read_bytes() != text
        named, message = record, "damaged record"
    else:
        extract(tiny_config(None, cache, tiny_base, quality="small", name="other"))
        (theirs,) = cache.glob("targets/other/codec.*.safetensors")
        if harm == "of another set":
            shutil.copy(theirs, path)
        elif harm == "record of another set":
            shutil.copy(cache / layout.codec_record("other"), record)
            named, message = record, "codec of another target set|not this set's"
        else:
            body = unsealed(record)
            body["payload"] = unsealed(cache / layout.codec_record("other"))["payload"]
            if harm == "parameters exchanged":  # consistent in itself, but not what the units were coded with
                moved = layout.codec_payload("tiny", body["payload"]["sha256"])
                shutil.copy(theirs, cache / moved)
                body["payload"]["name"] = moved
                named, message = cache / "records" / "targets" / "tiny", "coded with other parameters"
            else:
                named, message = record, "codec of another target set|not this set's"
            reseal(record, body)
    with pytest.raises(CacheError, match=message) as error:
        use(cache)
    assert error.value.where.startswith(str(named))
    assert error.value.todo
    if harm == "parameters exchanged":
        return  # which no accident does; no finished unit is decoded with them
    # an extraction does not go on over it either: what is stored could not be decoded
    before = files_below(cache)
    with pytest.raises(CacheError):
        extract(tiny_config(shards, cache, tiny_base, quality="default", views=3))
    after = files_below(cache)
    assert {n: after[n] for n in before} == before
    assert not [n for n in set(after) - set(before) if "targets" in n]
