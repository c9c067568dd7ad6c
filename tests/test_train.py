"""Stage two: the cache is worth the base in the loop, and a run is one run however often it stops."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay

import tec_cache.run.loop
from pipelines.extract import extract
from pipelines.terminal.texts import train_text
from pipelines.train import train
from tec_cache.cache.target_set import TargetSet
from tec_cache.config import TrainConfig
from tec_cache.errors import ConfigError, IdentityError, NonFiniteError, TecCacheError, WeightsError
from tec_cache.run.layout import checkpoints
from tec_cache.run.loop import Loop
from tec_cache.run.metrics import read_metrics
from tec_cache.run.optimizer import create_schedule
from tests.conftest import last_checkpoint, tiny_config, tiny_training, write_tiny_base

STEPS = 50


def losses(run: Path, name: str = "loss") -> np.ndarray:
    return np.array([line[name] for line in read_metrics(run)])


@pytest.fixture(scope="module")
def cached_run(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "cached"
    train(tiny_training(made_cache, run, epochs=17, steps=STEPS))
    return run


def online(made_cache: Path, run: Path, base: Path, **changes: Any) -> Any:
    return tiny_training(made_cache, run, epochs=17, steps=STEPS, online=str(base), k="3", **changes)


def test_cached_equals_online_and_the_base_runs_in_every_step(
    cached_run: Path, made_cache: Path, tiny_base: Path, tmp_path: Path
) -> None:
    summary = train(online(made_cache, tmp_path / "online", tiny_base))
    assert (summary.steps, summary.base_calls) == (STEPS, {str(tiny_base): STEPS})
    for name in ("loss", "feature", "attention"):
        cached, theirs = losses(cached_run, name), losses(tmp_path / "online", name)
        assert len(cached) == STEPS
        assert np.abs(cached - theirs).max() < 1e-3, name
    assert losses(cached_run)[-5:].mean() < 0.9 * losses(cached_run)[:5].mean()


def test_shifting_the_cached_rows_by_one_breaks_the_agreement(
    cached_run: Path, made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = TargetSet.read_block

    def shifted(self: TargetSet, *args: Any) -> Any:
        return {name: np.roll(values, 1, axis=0) for name, values in read(self, *args).items()}

    monkeypatch.setattr(TargetSet, "read_block", shifted)
    train(tiny_training(made_cache, tmp_path / "shifted", epochs=17, steps=10))
    assert np.abs(losses(tmp_path / "shifted") - losses(cached_run)[:10]).max() > 1e-2


@pytest.mark.parametrize(("quality", "most"), [("0.003,0.001", 0.01), ("high", 0.05), ("default", 0.1)])
def test_coded_targets_train_nearly_as_exact_ones(
    cached_run: Path, made_cache: Path, tiny_base: Path, tmp_path: Path, quality: str, most: float
) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    extract(tiny_config(None, cache, tiny_base, quality=quality, name="coded"))
    train(tiny_training(cache, tmp_path / "r", epochs=17, steps=10, target="coded"))
    found = np.abs(losses(tmp_path / "r") - losses(cached_run)[:10]).max()
    assert 1e-6 < found < most


@pytest.mark.parametrize("quality", ["high", "default", "small"])
def test_a_loss_on_coded_targets_is_lower_by_about_their_stated_error_and_the_output_says_so(
    cached_run: Path, made_cache: Path, tiny_base: Path, tmp_path: Path, quality: str
) -> None:
    """What coding leaves out has no energy that a student would have to predict."""
    cache = Path(shutil.copytree(made_cache, tmp_path / "c"))
    extract(tiny_config(None, cache, tiny_base, quality=quality, name="coded"))
    summary = train(tiny_training(cache, tmp_path / "r", epochs=17, steps=STEPS, target="coded"))
    (error,) = summary.target_errors.values()
    lower = (losses(cached_run, "feature") - losses(tmp_path / "r", "feature")).mean()
    assert 0.3 * error < lower < error
    said = train_text(summary, False, "")
    assert f"lower the feature loss by up to about {error:.2g}: not comparable with --online" in said
    assert "\\n" not in said, "an escaped line break"
    exact = train(tiny_training(cache, tmp_path / "exact", epochs=17, steps=1, target="tiny"))
    assert "not comparable with --online" not in train_text(exact, False, "")
    pixels = train(tiny_training(cache, tmp_path / "pixels", epochs=17, steps=1, pixels=True))
    assert not pixels.target_errors


@pytest.mark.parametrize("workers", [1, 3])
def test_stopped_and_resumed_is_the_same_run_to_the_bit(
    cached_run: Path, made_cache: Path, tmp_path: Path, workers: int
) -> None:
    """Stopped in the middle of an epoch and of a logged interval, and by a SIGINT."""
    run = tmp_path / "r"
    for stop in (4, 7, 8):
        train(tiny_training(made_cache, run, epochs=17, steps=stop, workers=workers, log_every=1))
    train_interrupted(tiny_training(made_cache, run, epochs=17, steps=STEPS, workers=workers), at=20)
    assert checkpoints(run)[-1].stem == "step-000000020"
    summary = train(tiny_training(made_cache, run, epochs=17, steps=STEPS, workers=workers))
    assert summary.finished
    assert [line["step"] for line in read_metrics(run)] == list(range(1, STEPS + 1))
    assert np.array_equal(losses(run), losses(cached_run))
    ours, theirs = (last_checkpoint(r)["model"] for r in (run, cached_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def train_interrupted(config: Any, *, at: int) -> None:
    step = Loop.train_step

    def and_interrupt(self: Loop[Any], *args: Any, **more: Any) -> None:
        step(self, *args, **more)
        if self.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "train_step", and_interrupt)
        summary = train(config)
    assert (summary.steps, summary.finished) == (at, False)


def test_a_kill_between_checkpoints_costs_only_the_steps_since(
    cached_run: Path, made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "r"
    step = Loop.train_step

    def die(self: Loop[Any], *args: Any, **more: Any) -> None:
        if self.step == 11:
            raise MemoryError
        step(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "train_step", die)
        with pytest.raises(MemoryError):
            train(tiny_training(made_cache, run, epochs=17, steps=20, save_every=2.0))
    assert checkpoints(run)[-1].stem == "step-000000006"
    assert len(read_metrics(run)) == 11
    train(tiny_training(made_cache, run, epochs=17, steps=20, save_every=2.0))
    assert np.array_equal(losses(run), losses(cached_run)[:20])
    assert len(checkpoints(run)) == 2


def test_micro_batches_add_up_to_the_batch(cached_run: Path, made_cache: Path, tmp_path: Path) -> None:
    train(tiny_training(made_cache, tmp_path / "r", epochs=17, steps=12, micro_batch=8))
    np.testing.assert_allclose(losses(tmp_path / "r"), losses(cached_run)[:12], rtol=2e-5)


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(made_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    script = Path(sys.executable).parent / "tec-cache"
    student = ("--student", "vit_tiny_patch16_224", "--student-arg", "patch_size=8")
    options = ("--batch-size", "32", "--epochs", "100000", "--device", "cpu")
    command = [str(script), "train", "--cache", str(made_cache), "--out", str(run), *student, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"tec-cache train --cache {made_cache} --out {run}" in out
    assert len(checkpoints(run)) >= 1


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(
    made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "r"
    inner = Loop.losses

    def spoiled(self: Loop[Any], *args: Any) -> Any:
        values = inner(self, *args)
        return {n: v * float("nan") for n, v in values.items()} if self.step == 7 else values

    monkeypatch.setattr(Loop, "losses", spoiled)
    with pytest.raises(NonFiniteError, match="step 8"):
        train(tiny_training(made_cache, run, epochs=17, steps=20))
    kept = last_checkpoint(run)
    assert kept["step"] == 6
    assert all(torch.isfinite(v).all() for v in kept["model"].values())


@pytest.mark.parametrize(
    ("changes", "bad", "noticed", "kept"),
    [({"log_every": 1}, 5, "5", 3), ({}, 6, "6", 3), ({"clip_grad": 1.0}, 5, "5", 3), ({}, 4, "[56]", 3)],
    ids=["logged", "saved", "clipped", "neither"],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_a_gradient_that_is_not_finite_is_never_saved(
    made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], bad: int,
    noticed: str, kept: int, value: float,
) -> None:  # fmt: skip
    """Where the norm is measured, before the update; else by a later loss or norm, or when it is to be saved.

    Fused attention may hide a weight that is not a number from the loss. The square of 1e30 is infinite: the weight
    then stands still ever after, and neither loss nor norm tells.
    """
    run = tmp_path / "r"
    accumulate = Loop.accumulate

    def spoiled(self: Loop[Any], *args: Any, **more: Any) -> None:
        accumulate(self, *args, **more)
        if self.step + 1 == bad:
            self.module.encoder.blocks[0].attn.qkv.weight.grad[0, 0] = value

    config = tiny_training(made_cache, run, **({"epochs": 17, "steps": 20, "log_every": 1000} | changes))
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "accumulate", spoiled)
        with pytest.raises(NonFiniteError) as error:
            train(config)
    assert re.search(f"at step {noticed}( |$)", error.value.what)
    assert [p.stem for p in checkpoints(run)] == [f"step-{kept:09d}"]
    assert all(torch.isfinite(v).all() for v in last_checkpoint(run)["model"].values())
    assert train(config).finished


def test_the_gradient_is_measured_only_where_it_is_used(made_cache: Path, tmp_path: Path) -> None:
    measured: list[int] = []
    norm = tec_cache.run.loop.gradient_norm

    def counted(*args: Any) -> torch.Tensor:
        measured[-1] += 1
        return norm(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tec_cache.run.loop, "gradient_norm", counted)
        for changes in ({"log_every": 4}, {"clip_grad": 1.0}):
            measured.append(0)
            train(tiny_training(made_cache, tmp_path / str(len(measured)), steps=9, save_every=100.0, **changes))
    assert measured == [3, 9], "of nine steps the 4th, 8th and last are logged"


def test_the_gradients_norm_is_the_logged_steps(cached_run: Path, made_cache: Path, tmp_path: Path) -> None:
    train(tiny_training(made_cache, tmp_path / "r", epochs=17, steps=9, log_every=4))
    lines = read_metrics(tmp_path / "r")
    assert [line["step"] for line in lines] == [4, 8, 9]
    every = losses(cached_run, "grad_norm")
    assert [line["grad_norm"] for line in lines] == [every[3], every[7], every[8]]
    assert lines[0]["loss"] == pytest.approx(losses(cached_run)[:4].mean(), rel=1e-6)


def test_a_run_goes_on_when_the_cache_has_grown(
    cached_run: Path, made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cache, run = Path(shutil.copytree(made_cache, tmp_path / "c")), tmp_path / "r"
    train(tiny_training(cache, run, epochs=17, steps=6))
    extract(tiny_config(shards, cache, tiny_base, views=3))
    extract(tiny_config(None, cache, tiny_base, k="1", name="another"))
    train(tiny_training(cache, run, epochs=17, steps=12))
    assert np.array_equal(losses(run), losses(cached_run)[:12])
    with pytest.raises(IdentityError, match="num_views: stored 2, asked 3"):
        train(tiny_training(cache, run, epochs=17, steps=14, views=3))


def test_a_flipped_bit_in_a_checkpoint_is_noticed(made_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    train(tiny_training(made_cache, run, steps=6))
    last = checkpoints(run)[-1]
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    with pytest.raises(TecCacheError, match="damaged checkpoint"):
        train(tiny_training(made_cache, run, steps=7))
    last.unlink()
    assert train(tiny_training(made_cache, run, steps=7)).finished, "as the message says"


def test_pixels_need_no_base(made_cache: Path, tmp_path: Path) -> None:
    summary = train(tiny_training(made_cache, tmp_path / "r", epochs=17, steps=30, pixels=True))
    assert set(summary.losses) == {"loss", "feature", "grad_norm"}
    curve = losses(tmp_path / "r")
    assert curve[-5:].mean() < 0.97 * curve[:5].mean()


def test_start_from_the_bases_weights(made_cache: Path, tiny_base: Path, tmp_path: Path) -> None:
    train(tiny_training(made_cache, tmp_path / "r", epochs=17, steps=1, init="base", base_lr=0.0))
    from safetensors.torch import load_file

    ours = last_checkpoint(tmp_path / "r")["model"]
    for name, value in load_file(tiny_base / "model.safetensors").items():
        assert torch.equal(ours[f"encoder.{name}"], value)
    other = write_tiny_base(tmp_path / "other", seed=3) / "model.safetensors"
    with pytest.raises(WeightsError, match="not the weights"):
        train(tiny_training(made_cache, tmp_path / "r2", init="base", base_weights=str(other)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"normalization": "none"}, "holds patch"), ({"last_layers": 1}, "last_layers 1"), ({"k": "4"}, "holds 3"),
     ({"k": "all"}, "all rows"), ({"target": "tinny"}, "did you mean tiny"), ({"batch_size": 128}, "does not fit"),
     ({"micro_batch": 7}, "micro-batches of 7"), ({"mask_ratio": 0.99}, "mask ratio"), ({"views": 3}, "missing"),
     ({"student_args": {"depth": 4}}, "groups of 3"), ({"student": "vit_tiny"}, "knows no model")],
)  # fmt: skip
def test_train_refuses_what_the_cache_or_the_student_cannot_give(
    made_cache: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "student_args" in changes:
        changes = {"student_args": {"patch_size": 8, **changes["student_args"]}}
    with pytest.raises(Exception, match=message) as error:
        train(tiny_training(made_cache, tmp_path / "r", **changes))
    assert hasattr(error.value, "todo")


def test_smaller_k_class_row_and_no_attention_are_free(made_cache: Path, tmp_path: Path) -> None:
    for k, names in (
        ("2", {"loss", "feature", "attention"}),
        ("0", {"loss", "feature", "attention"}),
        ("none", {"loss", "feature"}),
    ):
        tau = {} if k == "none" else {"tau": 0.7}
        assert set(train(tiny_training(made_cache, tmp_path / k, steps=1, k=k, **tau)).losses) == names | {"grad_norm"}


def test_other_settings_are_refused_and_free_ones_are_not(made_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    train(tiny_training(made_cache, run, steps=2))
    with pytest.raises(IdentityError, match=r"targets\[0, tiny\]\.tau: stored 1\.0, asked 0\.5"):
        train(tiny_training(made_cache, run, steps=3, tau=0.5))
    assert train(tiny_training(made_cache, run, steps=3, workers=1, micro_batch=16)).steps == 3
    assert train(tiny_training(made_cache, run, steps=2, tau=0.5), overwrite=True).steps == 2


def test_several_kinds_of_targets_at_once_are_refused(made_cache: Path) -> None:
    with pytest.raises(ConfigError, match="several kinds"):
        tiny_training(made_cache, made_cache, target="tiny", pixels=True)


def test_schedule_is_the_recipes() -> None:
    """Linear from 0 over the warm-up, then half a cosine to the smallest rate; MAE's formula, step by step."""
    model = VisionTransformer(32, 8, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=2.0)
    schedule = create_schedule(optimizer, total_steps=100, warmup_steps=20, min_lr=0.1)
    for step in range(100):
        schedule.step_update(step)
        expected = 2.0 * step / 20 if step < 20 else 0.1 + 0.95 * (1 + np.cos(np.pi * (step - 20) / 80))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected), step
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    named = {n: id(p) in decayed for n, p in model.named_parameters()}
    assert named["blocks.0.attn.qkv.weight"]
    assert named["cls_token"], "not one-dimensional, so MAE's rule decays it"
    assert not named["blocks.0.attn.qkv.bias"]
    assert not named["blocks.0.norm1.weight"]


def test_tensorboard_is_written(cached_run: Path) -> None:
    assert any(p.name.startswith("events.out.tfevents") for p in (cached_run / "tensorboard").iterdir())
    settings = json.loads((cached_run / "run.json").read_text())
    assert [of["kind"] for of in settings["targets"]] == ["cached"]
    assert settings["config"]["batch_size"] == 32


def test_recipe_warmup() -> None:
    config = TrainConfig
    assert config(cache="c", out="r").resolved_warmup == 40
    assert config(cache="c", out="r", epochs=20).resolved_warmup == 2
    with pytest.raises(ConfigError, match="warm-up"):
        config(cache="c", out="r", epochs=20, warmup_epochs=40)


def test_a_refused_run_leaves_nothing_and_overwrite_removes_nothing_for_it(made_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    with pytest.raises(ConfigError, match="does not fit"):
        train(tiny_training(made_cache, run, batch_size=4096))
    assert not run.exists()
    train(tiny_training(made_cache, run, steps=2))
    before = sorted(p.name for p in run.rglob("*"))
    with pytest.raises(ConfigError, match="micro-batches of 7"):
        train(tiny_training(made_cache, run, steps=2, micro_batch=7), overwrite=True)
    assert sorted(p.name for p in run.rglob("*")) == before


def test_a_checkpoint_that_cannot_be_written_says_how_to_go_on(
    made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "r"
    train(tiny_training(made_cache, run, steps=3))

    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail] unexpected pos")  # what torch says of a full disk

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(TecCacheError, match="bytes are free"):
            train(tiny_training(made_cache, run, steps=6))
    assert [p.stem for p in checkpoints(run)] == ["step-000000003"]
    assert train(tiny_training(made_cache, run, steps=6)).finished
