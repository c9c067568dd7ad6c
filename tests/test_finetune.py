"""Fine-tuning as a program: the same loop, so the same promises; and numbers that count every photo once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import cli
from pipelines.export import export
from pipelines.finetune import Photos, finetune
from pipelines.info import info
from pipelines.train import train
from tec_cache.data.source import open_source
from tec_cache.errors import ConfigError, IdentityError, TecCacheError
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.labelled import index_photos
from tec_cache.run.layout import checkpoints
from tec_cache.run.loop import Loop
from tec_cache.run.metrics import read_metrics
from tests.conftest import TINY, encoded, last_checkpoint, photo, tiny_training, write_shards, write_tar
from tests.launch import options, torchrun


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 photos to learn from and 13 to judge on, of four classes."""
    folder = tmp_path_factory.mktemp("labelled")
    write_shards(folder / "train", [24, 16])
    write_shards(folder / "test", [13], start=100)
    return folder


def tuning(photos: Path, base: Path, run: Path, **changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "model": str(base),
        "train": str(photos / "train"),
        "test": str(photos / "test"),
        "out": str(run),
        "recipe": "small",
        "epochs": 3,
        "batch_size": 8,
        "device": "cpu",
        "threads": 1,
        "workers": 1,
        "log_every": 1,
        "save_minutes": 0.0,
    }
    return FinetuneConfig(**(values | changes))


@pytest.fixture(scope="module")
def tuned(photos: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to: 15 steps, five to an epoch, photos mixed and blocks skipped."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    summary = finetune(tuning(photos, tiny_base, run, mixup=0.8, cutmix=1.0))
    assert summary.finished
    assert (summary.steps, summary.train_images, summary.test_images, summary.classes) == (15, 40, 13, 4)
    return run


def numbers(run: Path) -> list[dict[str, float]]:
    free = ("images_per_second", "waited", "seconds")
    return [{n: v for n, v in line.items() if n not in free} for line in read_metrics(run)]


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert numbers(ours) == numbers(theirs)
    one, other = last_checkpoint(ours)["model"], last_checkpoint(theirs)["model"]
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_epoch_is_judged_and_the_loss_falls(tuned: Path) -> None:
    lines = numbers(tuned)
    assert [line["step"] for line in lines] == list(range(1, 16))
    judged = [line for line in lines if "test_top1" in line]
    assert [line["step"] for line in judged] == [5, 10, 15]
    assert all(line["test_images"] == 13 for line in judged)
    assert all(line["test_top1"] * 13 == pytest.approx(round(line["test_top1"] * 13)) for line in judged)
    assert "test_top5" not in judged[0], "there are four classes"


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_in_the_middle_of_an_epoch_and_resumed_it_is_the_same_run_to_the_bit(
    photos: Path, tiny_base: Path, tuned: Path, tmp_path: Path, workers: int
) -> None:
    step = Loop.train_step

    def and_interrupt(self: Loop[Any], *args: Any, **more: Any) -> None:
        step(self, *args, **more)
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    config = tuning(
        photos, tiny_base, tmp_path / "r", mixup=0.8, cutmix=1.0, **({"workers": workers} if workers else {})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "train_step", and_interrupt)
        summary = finetune(config)
    assert (summary.steps, summary.finished) == (7, False)
    assert checkpoints(tmp_path / "r")[-1].stem == "step-000000007"
    assert finetune(config).finished
    # an interruption is no end of an epoch: nothing is judged there
    assert_same_run(tmp_path / "r", tuned)


def test_a_kill_costs_the_steps_since_the_last_checkpoint_only(
    photos: Path, tiny_base: Path, tuned: Path, tmp_path: Path
) -> None:
    step = Loop.train_step

    def die(self: Loop[Any], *args: Any, **more: Any) -> None:
        if self.step == 12:
            raise MemoryError
        step(self, *args, **more)

    config = tuning(photos, tiny_base, tmp_path / "r", mixup=0.8, cutmix=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "train_step", die)
        with pytest.raises(MemoryError):
            finetune(config)
    assert checkpoints(tmp_path / "r")[-1].stem == "step-000000010"
    assert finetune(config).finished
    assert_same_run(tmp_path / "r", tuned)


def test_micro_batches_add_up(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    for name, more in (("whole", {}), ("parts", {"micro_batch": 2})):
        finetune(tuning(photos, tiny_base, tmp_path / name, epochs=1, drop_path=0.0, **more))
    whole, parts = ([line["loss"] for line in numbers(tmp_path / name)] for name in ("whole", "parts"))
    np.testing.assert_allclose(parts, whole, rtol=2e-5)


def test_two_processes_judge_each_photo_once_and_train_as_one(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Thirteen photos on two ranks: a padding sampler would count fourteen."""
    alone = tuning(photos, tiny_base, tmp_path / "one", epochs=2, drop_path=0.0)
    finetune(alone)
    words = ["--no-python", "tec-cache", "finetune", str(tiny_base)]
    given = options(tuning(photos, tiny_base, tmp_path / "two", epochs=2, drop_path=0.0))
    at = given.index("--model")
    job = torchrun(tmp_path / "log", 2, *words, *given[:at], *given[at + 2 :], "--quiet")
    assert job.process.returncode == 0, job.err
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert [line.get("test_images") for line in two] == [line.get("test_images") for line in one]
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=2e-5)
    judged = [[line[n] for line in lines if "test_loss" in line for n in ("test_loss", "test_top1")]
              for lines in (one, two)]  # fmt: skip
    np.testing.assert_allclose(judged[1], judged[0], rtol=2e-4)


@pytest.mark.parametrize(
    ("tune", "rule"), [("full", "mae"), ("head", "mae"), ("head", "tec")], ids=["full", "linear probe", "mean head"]
)
def test_what_leaves_is_timms_model_with_head_names_and_numbers(
    photos: Path, tiny_base: Path, tmp_path: Path, tune: str, rule: str
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    recipe = {"recipe": "small" if tune == "full" else "light", "epochs": 1}
    summary = finetune(tuning(photos, tiny_base, run, tune=tune, rule=rule, **recipe))
    export(run, out)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    index = Photos.found(tuning(photos, tiny_base, run), quiet=True).test
    import io

    from PIL import Image

    from tec_cache.labelled import evaluation_transform

    cfg = model.pretrained_cfg
    look = evaluation_transform(int(cfg["input_size"][-1]), tuple(cfg["mean"]), tuple(cfg["std"]))
    images = torch.stack([look(Image.open(io.BytesIO(index.read(i))).convert("RGB")) for i in range(len(index))])
    with torch.no_grad():
        logits = model(images)
    right = (logits.argmax(1) == torch.from_numpy(index.label)).double().mean()
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(index.label))
    assert summary.last["test_top1"] == pytest.approx(float(right))
    assert summary.last["test_loss"] == pytest.approx(float(loss), rel=1e-4)
    kept = json.loads((out / "config.json").read_text())
    assert kept["num_classes"] == 4
    assert kept["tec_cache"]["scores"]["test_top1"] == summary.last["test_top1"]
    assert info(str(out))["scores"]["test_top1"] == summary.last["test_top1"]
    assert info(str(run))["logged"]["test_top1"] == summary.last["test_top1"]


def class_tar(path: Path, names: list[str], start: int = 0) -> Path:
    members = []
    for number, name in enumerate(names, start):
        members += [(f"{number:04d}.jpg", encoded(photo(number))), (f"{number:04d}.cls", name.encode())]
    return write_tar(path, members)


def test_classes_are_matched_by_name_and_those_never_learned_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    train_names = ["ant", "bee", "cat", "dog"] * 4
    class_tar(tmp_path / "in" / "train" / "a.tar", train_names)
    class_tar(tmp_path / "in" / "test" / "a.tar", ["dog", "cat"] * 3, start=50)
    found = Photos.found(tuning(tmp_path / "in", tiny_base, tmp_path / "r"), quiet=True)
    assert found.classes == ("ant", "bee", "cat", "dog")
    assert found.test.label.tolist() == [3, 2] * 3, "the test's own numbers would be 1 and 0"
    class_tar(tmp_path / "in" / "test" / "b.tar", ["eel"], start=90)
    with pytest.raises(ConfigError, match=r"the classes differ.*eel"):
        Photos.found(tuning(tmp_path / "in", tiny_base, tmp_path / "r"), quiet=True)
    shutil.rmtree(tmp_path / "in" / "test")
    class_tar(tmp_path / "in" / "test" / "a.tar", ["0", "4"], start=50)
    with pytest.raises(ConfigError, match="a photo is of class 4"):
        Photos.found(tuning(tmp_path / "in", tiny_base, tmp_path / "r"), quiet=True)
    shutil.rmtree(tmp_path / "in" / "train")
    class_tar(tmp_path / "in" / "train" / "a.tar", ["0", "1", "2"] * 4)
    with pytest.raises(ConfigError, match="judged is of class 4; those to learn from have 3"):
        Photos.found(tuning(tmp_path / "in", tiny_base, tmp_path / "r"), quiet=True)


def test_a_part_of_train_is_held_out_and_the_test_is_not_looked_at(
    photos: Path, tiny_base: Path, tmp_path: Path
) -> None:
    whole = index_photos(open_source(str(photos / "train")).with_labels())
    for share, held in ((0.1, 4), (0.25, 10)):
        learned, judged = whole.divided(share, seed=0)
        assert (len(learned), len(judged)) == (40 - held, held)
        assert sorted([*learned.keys, *judged.keys]) == sorted(whole.keys)
        for part in (learned, judged):
            place = {key: i for i, key in enumerate(whole.keys)}
            assert all(part.read(i) == whole.read(place[key]) for i, key in enumerate(part.keys))
    assert whole.divided(0.25, seed=1)[1].keys != whole.divided(0.25, seed=0)[1].keys
    summary = finetune(tuning(photos, tiny_base, tmp_path / "r", test=None, select=0.25, epochs=1))
    assert (summary.train_images, summary.test_images) == (30, 10)
    assert "held out of training" in summary.judged_on
    for wrong in ({"select": 0.5}, {"test": None}):
        with pytest.raises(ConfigError, match="--test"):
            tuning(photos, tiny_base, tmp_path / "x", **wrong)
    with pytest.raises(ConfigError, match="of 40 photos are 0"):
        whole.divided(0.001, seed=0)


def test_a_folder_of_another_task_or_other_settings_is_refused(
    photos: Path, tiny_base: Path, tuned: Path, made_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(TecCacheError, match="a run of tec-cache finetune, not of train"):
        train(tiny_training(made_cache, tuned, steps=1))
    train(tiny_training(made_cache, tmp_path / "p", steps=1))
    with pytest.raises(TecCacheError, match="a run of tec-cache train, not of finetune"):
        finetune(tuning(photos, tiny_base, tmp_path / "p"))
    before = (tuned / "run.json").read_bytes()
    for change in ({"base_lr": 1.0}, {"epochs": 4}, {"seed": 1}, {"recipe": "mae-b-300"}):
        with pytest.raises(IdentityError):
            finetune(tuning(photos, tiny_base, tuned, **({"mixup": 0.8, "cutmix": 1.0} | change)))
    other = tmp_path / "photos"
    shutil.copytree(photos, other)
    class_tar(other / "test" / "more.tar", ["1"], start=500)
    with pytest.raises(IdentityError, match="test"):
        finetune(tuning(other, tiny_base, tuned, mixup=0.8, cutmix=1.0))
    assert (tuned / "run.json").read_bytes() == before
    kept = json.loads(before)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text(json.dumps(kept | {"format": 1}))
    with pytest.raises(TecCacheError, match="of format 1, this program's are of 4"):
        finetune(tuning(photos, tiny_base, tmp_path / "old"))


def test_judging_leaves_no_trace_in_the_training(
    photos: Path, tiny_base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tec_cache.tasks.classify.Classify.evaluate", lambda self, model: {})
    finetune(tuning(photos, tiny_base, tmp_path / "r", mixup=0.8, cutmix=1.0))
    ours, theirs = numbers(tmp_path / "r"), numbers(tuned)
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]


def test_the_command_says_what_it_assumes_did_and_what_comes_next(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tuning(photos, tiny_base, tmp_path / "r", epochs=1))
    at = given.index("--model")
    words = ["tec-cache", "finetune", str(tiny_base), *given[:at], *given[at + 2 :]]

    def told(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().out

    code, out = told("--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["total_steps"] == 5
    assert not (tmp_path / "r").exists()
    code, out = told("--quiet")
    assert code == 0
    following = f"next         tec-cache export {tmp_path / 'r'} OUT"
    for part in ("recipe       small  (it was asked for)", "epochs 1, warmup epochs 0.166667", "13 to judge on",
                 "last epoch   top-1", "report the last", following):  # fmt: skip
        assert part in out, out
    code, out = told("--quiet", "--momentum", "0.5")
    assert code == 2


def test_light_tuning_from_a_run_of_ours_and_its_controls(
    photos: Path, tiny_base: Path, made_cache: Path, tmp_path: Path
) -> None:
    train(tiny_training(made_cache, tmp_path / "run", steps=2))
    export(tmp_path / "run", tmp_path / "model")
    trained = {}
    for tune, source in (("head", None), ("input-adapter", "pretrained"), ("adapters", "pretrained"),
                         ("adapters", "random")):  # fmt: skip
        more = {} if source is None else {"adapters_from": source}
        rule = {"rule": "tec"} if tune == "head" else {}
        run = tmp_path / f"{tune}-{source}"
        summary = finetune(tuning(photos, tmp_path / "model", run, tune=tune, recipe="light", epochs=1, **more, **rule))
        assert summary.finished
        trained[tune, source] = summary.trained_parameters
    assert trained["head", None] < trained["input-adapter", "pretrained"] < trained["adapters", "pretrained"]
    assert trained["adapters", "pretrained"] == trained["adapters", "random"]
    with pytest.raises(TecCacheError, match="no model of timm's"):
        export(tmp_path / "adapters-pretrained", tmp_path / "out")
    with pytest.raises(TecCacheError, match="adapter"):
        finetune(tuning(photos, tiny_base, tmp_path / "none", tune="adapters", recipe="light", epochs=1))


def test_random_models_and_weight_files(photos: Path, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    summary = finetune(tuning(photos, Path("random:vit_tiny_patch16_224"), tmp_path / "r", grid=2, epochs=1))
    assert summary.finished


def test_every_value_of_a_recipe_can_be_changed(
    photos: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import fields

    import pipelines.finetune
    from tec_cache.finetune.config import OF_RECIPE
    from tec_cache.finetune.recipes import FinetuneRecipe

    fixed = {"source", "betas", "test_crop", "warmup_epochs"}  # betas and warm-up are the loop's, by other names
    assert {f.name for f in fields(FinetuneRecipe)} - fixed == set(OF_RECIPE)
    seen: list[dict[str, Any]] = []
    real = pipelines.finetune.train_transform
    monkeypatch.setattr(
        pipelines.finetune, "train_transform", lambda *args, **more: seen.append(more) or real(*args, **more)
    )
    changes = {"auto_augment": "none", "reprob": 0.5, "crop_scale": (0.5, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
    run = tmp_path / "r"
    summary = finetune(tuning(photos, tiny_base, run, epochs=1, **changes))
    asked = {"auto_augment": None, "erase": 0.5, "scale": (0.5, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}
    assert {name: seen[-1][name] for name in asked} == asked
    assert summary.settings["reprob"] == 0.5
    assert finetune(tuning(photos, tiny_base, run, epochs=1, **changes)).finished, "it goes on with the same words"
    with pytest.raises(IdentityError, match="crop_scale"):
        finetune(tuning(photos, tiny_base, run, epochs=1, **(changes | {"crop_scale": (0.4, 1.0)})))
    with pytest.raises(ConfigError, match="timm knows no such policy"):
        finetune(tuning(photos, tiny_base, tmp_path / "x", auto_augment="nonsense-m9"))
    for wrong in ({"crop_scale": (0.5, 0.2)}, {"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.5, 1.5)},
                  {"crop_ratio": (2.0, 1.0)}, {"reprob": 1.5}, {"flip": -0.1}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", "-")):
            tuning(photos, tiny_base, tmp_path / "x", **wrong)


def test_memory_files_and_processes_are_as_many_after_ten_epochs_as_after_three(
    photos: Path, tiny_base: Path, tmp_path: Path
) -> None:
    import gc

    seen: list[tuple[int, int, int]] = []
    judge = Loop.evaluate

    def and_look(self: Loop[Any]) -> dict[str, float]:
        scores = judge(self)
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
        seen.append((resident, len(os.listdir("/proc/self/fd")), children))
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "evaluate", and_look)
        finetune(tuning(photos, tiny_base, tmp_path / "r", epochs=10))
    assert len(seen) == 10
    (early, files, children), (late, last_files, last_children) = seen[2], seen[-1]
    assert (last_files, last_children) == (files, children)
    assert late - early < 8 * 2**20


def test_runs_of_every_recipe_can_be_read_again() -> None:
    """run.json is checked against the settings' types, and a recipe may leave some of them out."""
    import dataclasses

    import msgspec

    from tec_cache.finetune.recipes import RECIPES
    from tec_cache.segment.config import SegmentConfig
    from tec_cache.segment.recipes import RECIPES as SEGMENT_RECIPES

    least = {"model": "m", "train": "a", "test": "b", "out": "r"}
    for name, recipe in RECIPES.items():
        for tune in ("full", "head"):
            made = FinetuneConfig(**least, tune=tune, recipe=name).resolved(recipe)
            kept = json.loads(json.dumps(dataclasses.asdict(made)))
            assert msgspec.convert(kept, FinetuneConfig) == made, name
    for name, masked in SEGMENT_RECIPES.items():
        segmenter = SegmentConfig(**least, recipe=name).resolved(masked)
        assert msgspec.convert(json.loads(json.dumps(dataclasses.asdict(segmenter))), SegmentConfig) == segmenter


def test_a_linear_probe_goes_on_and_leaves(photos: Path, tiny_base: Path, tmp_path: Path) -> None:
    changes = {"tune": "head", "recipe": "linear", "epochs": 2}
    assert finetune(tuning(photos, tiny_base, tmp_path / "r", steps=5, **changes)).steps == 5
    assert finetune(tuning(photos, tiny_base, tmp_path / "r", **changes)).finished
    export(tmp_path / "r", tmp_path / "out")
    assert info(str(tmp_path / "r"))["finished"]
