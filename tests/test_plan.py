"""The plan: bytes and stages as the real extraction has them, arithmetic that adds up, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cli
import pipelines.plan
import pipelines.planning.source
from pipelines.extract import extract
from pipelines.plan import plan
from pipelines.planning.amount import Amount
from pipelines.planning.extract import TargetCosts, ViewCosts, Written, settled
from pipelines.planning.result import Plan
from pipelines.planning.training import TrainingCosts
from tec_cache.base.load import load_base
from tec_cache.base.model import FrozenBase
from tec_cache.config import PlanConfig
from tec_cache.errors import ConfigError, IdentityError, SourceError
from tec_cache.flops import base_macs, student_macs
from tec_cache.student.masking import num_visible_patches
from tec_cache.student.model import create_student
from tec_cache.targets import normalize_targets
from tests.conftest import TINY, encoded, files_below, photo, tiny_config, tiny_training, write_shards, write_tar


def planning(shards: Path | None, cache: Any, base: Path | None, **changes: Any) -> PlanConfig:
    own = {name: changes.pop(name) for name in ("images",) if name in changes}
    train = replace(tiny_training(Path("x"), Path("y")), epochs=10, batch_size=32)
    return PlanConfig(extract=tiny_config(shards, cache, base, **changes), train=train, seconds=5.0, **own)


@pytest.mark.parametrize("quality", ["exact", "default"])
def test_bytes_are_those_of_the_real_extraction(quality: str, tiny_base: Path, tmp_path: Path) -> None:
    # equal units: of tiny crops and targets, padding and metadata are a large part
    shards = write_shards(tmp_path / "photos", [32, 32, 32])
    changes = {"quality": quality} | ({} if quality == "exact" else {"fit_views": 64})
    found = plan(planning(shards, tmp_path / "c", tiny_base, **changes))
    real = extract(tiny_config(shards, tmp_path / "c", tiny_base, **changes))
    assert (found.amount.photos, found.amount.estimated) == (96, False)
    assert (found.amount.crops_left, found.amount.targets_left, found.quality) == (192, 192, quality)
    assert found.views.written.num_bytes == pytest.approx(real.bytes_per_crop, rel=0.05)
    assert found.bytes_per_target == pytest.approx(real.bytes_per_target, rel=0.05)
    disk = sum(len(data) for data in files_below(tmp_path / "c").values())
    assert found.bytes_needed == pytest.approx(disk, rel=0.06)


def test_what_a_cache_holds_is_not_planned_again(
    shards: Path, tiny_base: Path, made_cache: Path, tmp_path: Path
) -> None:
    # a copy: an extraction that is refused, in another test, leaves an empty folder of drafts
    made_cache = Path(shutil.copytree(made_cache, tmp_path / "c", ignore=shutil.ignore_patterns(".drafts")))
    before = files_below(made_cache)
    done = plan(planning(shards, made_cache, tiny_base))
    assert (done.amount.photos_to_cut, done.amount.crops_left, done.amount.targets_left) == (0, 0, 0)
    assert (done.bytes_needed, done.fitted) == (0, (0, 0))
    assert done.amount.bytes_there == pytest.approx(sum(map(len, before.values())), rel=0.05)
    more = plan(planning(shards, made_cache, tiny_base, views=3))
    assert (more.amount.photos_to_cut, more.amount.crops_left, more.amount.targets_left) == (97, 97, 97)
    other = plan(planning(None, made_cache, tiny_base, name="other", quality="exact"))
    assert (other.amount.crops_left, other.amount.targets_left, other.fitted) == (0, 194, (0, 32))
    assert files_below(made_cache) == before
    assert not (made_cache / ".drafts").exists()


def test_half_a_cache(shards: Path, tiny_base: Path, made_cache: Path, tmp_path: Path) -> None:
    cache = tmp_path / "half"
    shutil.copytree(made_cache, cache)
    for record in cache.glob("records/targets/tiny/000000/*-v00.json"):
        record.unlink()
    for record in cache.glob("records/**/000002*.json"):
        record.unlink()
    found = plan(planning(shards, cache, tiny_base))
    assert (found.amount.crops_left, found.amount.photos_to_cut) == (66, 33)
    assert found.amount.targets_left == 66 + 40


def test_another_cache_is_refused(shards: Path, tiny_base: Path, made_cache: Path) -> None:
    with pytest.raises(IdentityError, match="size"):
        plan(planning(shards, made_cache, tiny_base, size=40))


@pytest.mark.parametrize("stage", ["measure_targets", "measure_training"])
def test_nothing_stays_after_ctrl_c(
    stage: str, shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        assert list(tmp_path.rglob("*.tar")), "the plan writes beside the cache"
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.plan, stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan(planning(shards, tmp_path / "deep" / "c", tiny_base))
    assert list(tmp_path.iterdir()) == []


def test_a_cache_behind_a_url(shards: Path, tiny_base: Path) -> None:
    found = plan(planning(shards, "memory://planned", tiny_base))
    assert (found.free, found.fits, found.amount.crops_left) == (None, None, 194)
    assert fsspec.filesystem("memory").find("/planned") == []


def slowed(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, seconds: Any) -> None:
    whole = getattr(module, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds(args))
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, name, slow)


def test_hours_of_a_slow_base(shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, FrozenBase, "forward", lambda args: 0.01 * len(args[1]))
    changes = {"quality": "exact", "group_size": 64}
    found = plan(planning(shards, tmp_path / "c", tiny_base, **changes))
    begin = time.monotonic()
    extract(tiny_config(shards, tmp_path / "c", tiny_base, **changes))
    assert found.bottleneck == "base"
    # a sleep cannot be shorter, and a busy machine makes the rest longer
    assert 194 * 0.01 < found.seconds["base"] < 194 * 0.02
    assert 32 * 0.01 < found.seconds["fitting the codec"] < 32 * 0.02
    assert sum(found.seconds.values()) == pytest.approx(time.monotonic() - begin, rel=0.4)


def test_how_long_it_takes_is_said_first(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(planning(shards, tmp_path / "c", tiny_base, quality="exact"), seconds=2.0)
    plan(config, quiet=False)
    lines = capsys.readouterr().err.splitlines()
    (said,) = [number for number, line in enumerate(lines) if line.startswith("plan: measuring takes about 2")]
    assert lines[said].endswith(" s")
    stages = [line.split(", ")[0] for line in lines[said + 1 :]]
    assert [stage.split(":")[1] for stage in stages] == [" photos", " crops", " crops to disk", " targets", " training"]
    slowed(monkeypatch, FrozenBase, "forward", lambda args: 0.05 * len(args[1]))
    plan(config, quiet=False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "measuring takes" in line]
    told = r"plan: measuring takes about \d+\.\d s: the base takes 0\.\d+ s per view here, and needs 32 views"
    assert re.fullmatch(told, line)
    plan(planning(shards, tmp_path / "c", None, views_only=True))
    assert capsys.readouterr().err == ""


def test_hours_of_slow_photos_count_the_threads(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, pipelines.planning.source, "cut_photo", lambda _: 0.02)
    found = plan(planning(shards, tmp_path / "c", None, views_only=True, workers=4))
    assert 97 * 0.02 / 4 < found.seconds["decoding and cropping"] < 97 * 0.02 / 2
    assert (found.targets, found.training, found.epoch_seconds, found.break_even_epochs) == (None, None, {}, None)


def test_photos_are_estimated_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "photos", [60, 60, 60, 60])
    for name, value in (("MOST_SHARDS", 1), ("SAMPLE", 8)):
        monkeypatch.setattr(pipelines.planning.source, name, value)
    config = planning(folder, tmp_path / "c", None, views_only=True)
    config = replace(config, seconds=1e-9)
    by_sample = plan(config)
    assert by_sample.amount.estimated
    assert by_sample.amount.photos == pytest.approx(240, rel=0.1)
    counted = plan(replace(config, seconds=20.0))
    assert (counted.amount.photos, counted.amount.estimated) == (240, False)
    told = plan(replace(config, images=1_000_000))
    assert (told.amount.photos, told.amount.crops_left, told.amount.estimated) == (1_000_000, 2_000_000, False)


def test_broken_photos_are_named(tmp_path: Path) -> None:
    members = [(f"p{i}.jpg", encoded(photo(i)) if i % 4 else b"rubbish") for i in range(16)]
    write_tar(tmp_path / "photos" / "a.tar", members)
    stop = plan(planning(tmp_path / "photos", tmp_path / "c", None, views_only=True))
    assert len(stop.views.broken) == 4
    assert "a.tar p0: not an image" in " ".join(sorted(stop.views.broken))
    skip = plan(planning(tmp_path / "photos", tmp_path / "c", None, views_only=True, on_error="skip"))
    assert (stop.amount.photos, skip.amount.photos) == (16, 12)
    write_tar(tmp_path / "none" / "a.tar", [("p.jpg", b"rubbish")])
    with pytest.raises(ConfigError, match="none of the photos"):
        plan(planning(tmp_path / "none", tmp_path / "c", None, views_only=True))
    (tmp_path / "none" / "a.tar").write_bytes(b"no tar at all")
    with pytest.raises(SourceError, match="damaged"):
        plan(planning(tmp_path / "none", tmp_path / "c", None, views_only=True))


def by_hand(**changes: Any) -> Plan:
    """1,000 photos in 4 views, all figures round."""
    values: dict[str, Any] = {
        "cache": "c",
        "target": "t",
        "quality": "default",
        "amount": Amount(1000, False, 4, 1000, 4000, 4000, 0),
        "views": ViewCosts(100, (), 0.001, 0.01, Written(0.001, 20_000, 100)),
        "targets": TargetCosts(64, 0.1, 0.001, 0.01, 0.02, 0.03, Written(0.005, 40_000, 100), 0.5),
        "fitted": (512, 128),
        "training": TrainingCosts(8, 0.2, 6.4, 0.01, 0.11, 0.002, 0.001, False, 0.5, 1000, 3000),
        "free": 10**9,
        "epochs": 10,
        "batch_size": 64,
        "start": 2.0,
        "measured_seconds": 20.0,
        "sampled_share": 0.5,
    }
    return Plan(**(values | changes))


def test_the_arithmetic() -> None:
    found = by_hand()
    seen = 512 / 4000
    assert found.bytes_per_target == 40_000 * (seen + (1 - seen) * 1.5)
    assert by_hand(fitted=(0, 0)).bytes_needed == 4000 * 80_200
    assert found.seconds == pytest.approx(
        {
            "start": 2,
            "reading photos": 1,
            "decoding and cropping": 10,
            "writing crops": 4,
            "fitting the codec": 640 * 0.1 + 512 * 0.02 + 128 * 0.03 + 0.5 * 1000 * 0.001 + 640 * 0.01,
            "base": 400,
            "encoding": 40,
            "writing targets": 20,
        }
    )
    # student 0.2, a 64th of the optimizer 0.1, targets; on a CPU half of the cores' time of reading
    assert found.epoch_seconds == pytest.approx({"cached": 1000 * 0.311, "online": 1000 * 0.4105})
    epochs = sum(found.seconds.values()) / (410.5 - 311)
    assert found.break_even_epochs == pytest.approx(epochs)
    assert found.to_json()["break_even"]["runs"] == pytest.approx(epochs / 10)
    assert found.flop == {
        "extraction": 2 * 1000 * 4640,
        "cached_run": 2 * 3000 * 10_000,
        "online_run": 2 * 4000 * 10_000,
    }
    assert found.training is not None
    on_gpu = replace(found.training, overlaps=True, load_cached=0.5)
    assert on_gpu.per_view(64) == pytest.approx({"cached": 0.5, "online": 0.41})
    assert on_gpu.bottleneck(64) == {"cached": "loader", "online": "student"}
    # a base of its own device works beside the cores: the slower of both
    assert found.total_seconds == pytest.approx(sum(found.seconds.values()))
    first = 2 + found.seconds["fitting the codec"]
    assert found.targets is not None
    beside = by_hand(targets=replace(found.targets, own_device=True))
    assert beside.total_seconds == pytest.approx(first + 400 + 40)
    slow = by_hand(targets=replace(found.targets, own_device=True, base=0.001, encode=0.001))
    first = 2 + slow.seconds["fitting the codec"]
    assert slow.total_seconds == pytest.approx(first + 1 + 10 + 4 + 20 + 4000 * 0.001)
    never = by_hand(training=on_gpu)
    assert (never.break_even_epochs, never.to_json()["break_even"]) == (None, {"epochs": None, "runs": None})


@pytest.mark.parametrize(("free", "fits"), [(4000 * 80_200, False), (4000 * 84_300, True), (None, None)])
def test_what_fits_has_the_error_of_the_plan_to_spare(free: int | None, fits: bool | None) -> None:
    assert by_hand(free=free, fitted=(0, 0)).fits is fits


def test_macs_are_those_that_torch_counts(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), grid=4, k=3)
    images = torch.randn(1, 3, 32, 32)
    # not every torch counts a fused attention on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        targets = normalize_targets(base(images), "patch")
    assert base_macs(base) == counter.get_total_flops() / 2
    for adapters in ("both", "encoder", "none"):
        student = create_student(
            "vit_tiny_patch16_224", targets=base.spec("patch"), model_args=TINY, adapters=adapters, decoder_width=32,
            decoder_heads=4,
        )  # fmt: skip
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            sum(student(images, targets, noise=torch.rand(1, 16)).values())
        own = student_macs(student, num_visible_patches(16, 0.75))
        once = 2 * 4 * 48**2 if adapters == "both" else 0  # the input adapter: one class token a batch
        assert own == counter.get_total_flops() / 2 - once


def test_macs_of_vit_b() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    base = FrozenBase(model, name="b", identity={}, mean=(0, 0, 0), std=(1, 1, 1), k=15)
    assert base_macs(base) == pytest.approx(17.6e9, rel=0.01)
    student = create_student(targets=base.spec("patch"))
    spared = (196 - 49) * 16 * 16 * 3 * 768  # the released program embeds the patches that it drops as well
    assert student_macs(student, 49) + spared == pytest.approx(8.3e9, rel=0.015)


def call(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["tec-cache", "plan", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), capsys.readouterr().out


def test_the_command(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    student = [f"--student-arg={name}={value}" for name, value in TINY.items()]
    arguments = [str(shards), "--cache", str(tmp_path / "c"), "--base", str(tiny_base), "--size", "32", "--grid", "4",
                 "--views", "2", "--device", "cpu", "--threads", "1", "--seconds", "2", "--student",
                 "vit_tiny_patch16_224", *student, "--epochs", "7", "--batch-size", "64", "--base-batch-size", "8",
                 "--quality", "exact", "--quiet"]  # fmt: skip
    code, out = call(monkeypatch, capsys, *arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["photos"], found["left"]["targets"], found["bytes"]["fits"]) == (97, 194, True)
    assert (found["train"]["epochs"], found["train"]["batch_size"]) == (7, 64)
    assert found["extract"]["hours_total"] == pytest.approx(sum(found["extract"]["hours"].values()))
    code, out = call(monkeypatch, capsys, *arguments, "--images", str(10**12))
    assert code == 1
    for text in ("IT DOES NOT FIT", "1,000,000,000,000", "<- bottleneck", "paid back", "GMAC", "nothing was written"):
        assert text in out
    code, _ = call(monkeypatch, capsys, *arguments, "--seconds", "0")
    assert code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_is_measured_with_as_many_views_as_keep_it_busy() -> None:
    """A hundred kernels take 10 ms to launch, however few views they work on; a view takes 0.1 ms."""
    tried: list[int] = []

    def seconds_of(count: int) -> float:
        tried.append(count)
        return max(0.01, count * 1e-4)

    assert settled(seconds_of, 512, torch.device("cuda:0")) == pytest.approx(1e-4)
    assert max(tried) == 256
    tried.clear()
    assert settled(seconds_of, 20, torch.device("cuda:0")) == pytest.approx(0.01 / 20)
    assert max(tried) == 20
    tried.clear()
    assert settled(seconds_of, 512, torch.device("cpu")) == pytest.approx(0.01 / 4)
    assert tried == [4]
    assert settled(lambda count: 0.3, 1, torch.device("cpu")) == 0.3
