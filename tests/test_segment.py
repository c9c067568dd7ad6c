"""Segmentation as a program: the same loop, so the same promises; and numbers that anyone can count again."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

import cli
from pipelines.export import export
from pipelines.finetune import finetune
from pipelines.info import info
from pipelines.loading.encoder_source import load_encoder
from pipelines.segment import segment
from tec_cache.data.masks import decode_mask
from tec_cache.data.source import open_source
from tec_cache.errors import ConfigError, IdentityError, SourceError, TecCacheError
from tec_cache.labelled.masked import index_masked_photos
from tec_cache.run.layout import checkpoints
from tec_cache.run.loop import Loop
from tec_cache.run.metrics import read_metrics
from tec_cache.segment.config import SegmentConfig
from tests.conftest import encoded, last_checkpoint, photo, write_tar
from tests.launch import options, torchrun
from tests.test_finetune import assert_same_run, numbers, tuning
from tests.test_masks import pair, write_pairs


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 photos with masks to learn from and 7 to judge on, of four classes."""
    folder = tmp_path_factory.mktemp("masked")
    write_pairs(folder / "train" / "a.tar", 18)
    write_pairs(folder / "train" / "b.tar", 12, start=18)
    write_pairs(folder / "test" / "a.tar", 7, start=100)
    return folder


def segmenting(masks: Path, base: Path, run: Path, **changes: Any) -> SegmentConfig:
    values: dict[str, Any] = {
        "model": str(base),
        "train": str(masks / "train"),
        "test": str(masks / "test"),
        "out": str(run),
        "grid": 4,
        "epochs": 3,
        "batch_size": 6,
        "device": "cpu",
        "threads": 1,
        "workers": 1,
        "log_every": 1,
        "save_minutes": 0.0,
    }
    return SegmentConfig(**(values | changes))


@pytest.fixture(scope="module")
def segmented(masks: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to: 15 steps, five to an epoch, blocks skipped."""
    run = tmp_path_factory.mktemp("segmented") / "run"
    summary = segment(segmenting(masks, tiny_base, run, drop_path=0.2))
    assert (summary.steps, summary.finished, summary.classes) == (15, True, 4)
    assert (summary.train_images, summary.test_images, summary.recipe) == (30, 7, "small")
    return run


def test_every_epoch_is_judged_and_the_loss_falls(segmented: Path) -> None:
    lines = numbers(segmented)
    assert [line["step"] for line in lines if "test_miou" in line] == [5, 10, 15]
    assert all(line["test_images"] == 7 for line in lines if "test_miou" in line)
    assert np.mean([line["loss"] for line in lines[-3:]]) < np.mean([line["loss"] for line in lines[:3]])
    kept = info(str(segmented))
    assert (kept["task"], kept["num_classes"], kept["recipe"], kept["finished"]) == ("segment", 4, "small", True)
    assert kept["logged"]["test_miou"] == lines[-1]["test_miou"]


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_in_the_middle_of_an_epoch_and_resumed_it_is_the_same_run_to_the_bit(
    masks: Path, tiny_base: Path, segmented: Path, tmp_path: Path, workers: int
) -> None:
    step = Loop.train_step

    def and_interrupt(self: Loop[Any], *args: Any, **more: Any) -> None:
        step(self, *args, **more)
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    config = segmenting(masks, tiny_base, tmp_path / "r", drop_path=0.2, workers=workers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "train_step", and_interrupt)
        summary = segment(config)
    assert (summary.steps, summary.finished, summary.last["step"]) == (7, False, 5)
    assert checkpoints(tmp_path / "r")[-1].stem == "step-000000007"
    assert segment(config).finished
    assert_same_run(tmp_path / "r", segmented)


def test_predictions_on_disk_give_the_numbers_that_are_reported(
    masks: Path, tiny_base: Path, segmented: Path, tmp_path: Path
) -> None:
    """Counted again by scikit-learn, from the files alone; a finished run is judged again for them, and stays."""
    before = {p.name: p.read_bytes() for p in segmented.iterdir() if p.is_file()}
    seen = tmp_path / "seen"
    summary = segment(segmenting(masks, tiny_base, segmented, drop_path=0.2, save_predictions=str(seen)))
    assert {p.name: p.read_bytes() for p in segmented.iterdir() if p.is_file()} == before
    truth, said = [], []
    index = index_masked_photos(open_source(str(masks / "test")).with_masks())
    for number, key in enumerate(index.keys):
        truth.append(index.mask(number).ravel())
        said.append(decode_mask((seen / f"{key}.png").read_bytes()).ravel())
        assert Image.open(seen / f"{key}.jpg").size == (3 * 80, 60)
    t, s = np.concatenate(truth), np.concatenate(said)
    present = sorted(set(t) | set(s))
    iou = jaccard_score(t, s, average=None, labels=present)
    assert [summary.iou[c] for c in present] == pytest.approx(list(iou), rel=1e-12)
    assert summary.last["test_miou"] == pytest.approx(float(np.mean(iou)), rel=1e-12)
    assert summary.last["test_pixel_accuracy"] == pytest.approx(accuracy_score(t, s), rel=1e-12)
    assert summary.pixels == [int((t == c).sum()) for c in range(4)]
    assert len(list(seen.iterdir())) == 15, "seven masks, seven pictures, and what says whose they are"


def test_it_learns_what_can_be_learned(masks: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Colours tell the classes: far above what a random guess of the most frequent class would reach."""
    config = segmenting(masks, tiny_base, tmp_path / "r", epochs=30, base_lr=0.1, judge_every=30, layer_decay=1.0)
    summary = segment(config)
    assert summary.last == summary.best
    assert summary.last["test_miou"] > 0.5
    assert summary.last["test_pixel_accuracy"] > 0.7


def test_two_processes_judge_each_photo_once_and_train_as_one(masks: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Seven photos on two ranks: a padding sampler would count eight."""
    segment(segmenting(masks, tiny_base, tmp_path / "one", epochs=2))
    words = ["--no-python", "tec-cache", "segment", str(tiny_base)]
    given = options(segmenting(masks, tiny_base, tmp_path / "two", epochs=2))
    at = given.index("--model")
    job = torchrun(tmp_path / "log", 2, *words, *given[:at], *given[at + 2 :], "--quiet")
    assert job.process.returncode == 0, job.err
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert [line.get("test_images") for line in two] == [line.get("test_images") for line in one]
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-3)
    scores = [[line[n] for line in lines if "test_miou" in line for n in ("test_miou", "test_pixel_accuracy")]
              for lines in (one, two)]  # fmt: skip
    np.testing.assert_allclose(scores[1], scores[0], atol=0.02)


def test_upernet_trains_on_four_blocks_and_is_judged_in_windows(masks: Path, tmp_path: Path) -> None:
    base = Path("random:vit_tiny_patch16_224")
    summary = segment(segmenting(masks, base, tmp_path / "r", head="upernet", grid=2, epochs=1, micro_batch=3))
    assert (summary.head, summary.finished) == ("upernet", True)
    assert 0 < summary.last["test_pixel_accuracy"] <= 1


def test_the_head_alone_leaves_the_encoder_as_it_was(masks: Path, tiny_base: Path, tmp_path: Path) -> None:

    segment(segmenting(masks, tiny_base, tmp_path / "r", tune="head", epochs=1))
    state, source = last_checkpoint(tmp_path / "r")["model"], load_encoder(str(tiny_base)).model.state_dict()
    assert all(torch.equal(state[f"vit.{name}"], value) for name, value in source.items())
    with pytest.raises(ConfigError, match="not used: --layer-decay; the encoder's blocks are frozen"):
        segmenting(masks, tiny_base, tmp_path / "x", tune="head", layer_decay=0.5)


def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    masks: Path, tiny_base: Path, segmented: Path, tmp_path: Path
) -> None:
    picture, _ = pair(0)
    beyond = encoded(Image.fromarray(np.full((60, 80), 7, np.uint8)), "PNG")
    write_tar(tmp_path / "far" / "test" / "a.tar", [("a.png", picture), ("a.seg.png", beyond)])
    (tmp_path / "far" / "train").symlink_to(masks / "train")
    with pytest.raises(ConfigError, match=r"a mask has the value 7; the 4 classes have up to 3") as told:
        segment(segmenting(tmp_path / "far", tiny_base, tmp_path / "r1", epochs=1))
    assert "far/test" in str(told.value)
    assert not (tmp_path / "r1").exists()
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match="the 2 classes have up to 1"):
        segment(segmenting(masks, tiny_base, tmp_path / "r2", classes=str(names)))
    write_tar(tmp_path / "bare" / "train" / "a.tar", [("a.jpg", encoded(photo(0))), ("a.cls", b"0")])
    with pytest.raises(SourceError, match="no photo has a mask"):
        segment(segmenting(tmp_path / "bare", tiny_base, tmp_path / "r3", test=None, select=0.5))
    assert not (tmp_path / "r3").exists()
    empty = encoded(Image.fromarray(np.full((60, 80), 255, np.uint8)), "PNG")
    write_tar(tmp_path / "void" / "test" / "a.tar", [("a.png", picture), ("a.seg.png", empty)])
    (tmp_path / "void" / "train").symlink_to(masks / "train")
    with pytest.raises(SourceError, match="no pixel of the masks to be judged on is of a known class"):
        segment(segmenting(tmp_path / "void", tiny_base, tmp_path / "r4", epochs=1))
    for change in ({"base_lr": 1.0}, {"ignore": 3}, {"head": "upernet"}, {"seed": 1}):
        with pytest.raises((IdentityError, ConfigError)):
            segment(segmenting(masks, tiny_base, segmented, drop_path=0.2, **change))
    other = tuning(masks, tiny_base, segmented, train=str(_labelled(tmp_path)), test=None, select=0.5)
    with pytest.raises(TecCacheError, match="a run of tec-cache segment, not of finetune"):
        finetune(other)


def _labelled(folder: Path) -> Path:
    members = []
    for number in range(16):
        members += [(f"{number:04d}.jpg", encoded(photo(number))), (f"{number:04d}.cls", str(number % 2).encode())]
    write_tar(folder / "labelled" / "a.tar", members)
    return folder / "labelled"


def test_an_ignored_value_among_the_classes_and_names_in_the_table(
    masks: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("first\nsecond\nthird\n")
    given = options(
        segmenting(
            masks,
            tiny_base,
            tmp_path / "r",
            epochs=1,
            ignore=0,
            classes=str(names),
            save_predictions=str(tmp_path / "seen"),
        )
    )
    at = given.index("--model")
    words = ["tec-cache", "segment", str(tiny_base), *given[:at], *given[at + 2 :]]

    def told(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().out

    code, out = told("--dry-run", "--json")
    assert (code, json.loads(out)["total_steps"]) == (0, 5)
    assert not (tmp_path / "r").exists()
    code, out = told("--quiet")
    assert code == 0
    for part in ("3 classes", "value 0 of masks is ignored", "  second", "last epoch   mIoU", "predictions  "):
        assert part in out, out
    said = decode_mask((tmp_path / "seen" / "00100.png").read_bytes())
    assert said.min() >= 1, "what is ignored is never predicted"
    assert said.max() <= 3


def test_a_broken_mask_is_named_or_skipped(masks: Path, tiny_base: Path, tmp_path: Path) -> None:
    members = []
    for number in range(14):
        picture, mask = pair(number)
        members += [(f"{number:05d}.png", picture), (f"{number:05d}.seg.png", mask[:50] if number == 3 else mask)]
    write_tar(tmp_path / "in" / "train" / "a.tar", members)
    (tmp_path / "in" / "test").symlink_to(masks / "test")
    config = segmenting(tmp_path / "in", tiny_base, tmp_path / "r", epochs=1)
    with pytest.raises(SourceError, match="photo '00003': its mask is not a whole PNG"):
        segment(config)
    summary = segment(segmenting(tmp_path / "in", tiny_base, tmp_path / "r", epochs=1, on_error="skip"))
    assert len(summary.damaged) == 1
    assert "00003" in summary.damaged[0]


def test_keys_cannot_lead_out_of_the_folder_of_predictions(tmp_path: Path) -> None:
    from dataclasses import replace

    from pipelines.judging.pictures import PredictionWriter
    from tec_cache.mask_values import Values

    picture, mask = pair(0)
    members = []
    for key in ("../../out", "a/b/c", "x y#%", "...", "写真", "я" * 120, "tab\there"):
        members += [(f"{key}.png", picture), (f"{key}.seg.png", mask)]
    index = replace(index_masked_photos(open_source(str(write_tar(tmp_path / "a.tar", members))).with_masks()),
                    values=Values(255, 4))  # fmt: skip
    writer = PredictionWriter(tmp_path / "seen", index)
    classes = np.zeros((60, 80), np.int64)
    for number in range(len(index)):
        path = writer.path(number)
        assert (tmp_path / "seen").resolve() in path.resolve().parents, path
        writer.write(number, classes, classes)
    assert (tmp_path / "seen" / "写真.png").is_file()
    twice = write_tar(tmp_path / "b.tar", members[2:4])
    other = replace(index_masked_photos(open_source(f"{tmp_path}/{{a,b}}.tar").with_masks()), values=Values(255, 4))
    assert twice.exists()
    paths = {PredictionWriter(tmp_path / "seen", other).path(number) for number in range(len(other))}
    assert len(paths) == len(other)


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_what_leaves_is_timms_encoder_with_the_head_beside_it(
    masks: Path, segmented: Path, tmp_path: Path, head: str
) -> None:
    import timm
    from safetensors.torch import load_file

    run, out = segmented, tmp_path / "out"
    if head == "upernet":
        run = tmp_path / "run"
        base = Path("random:vit_tiny_patch16_224")
        segment(segmenting(masks, base, run, head=head, grid=2, epochs=1, steps=1))
    export(run, out)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    state = last_checkpoint(run)["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f"vit.{name}"]), name
    beside = load_file(out / "adapters" / "adapters.safetensors")
    assert {n.removeprefix("segmentation_") for n in beside} == {n for n in state if n.startswith("head.")}
    assert all(torch.equal(value, state[n.removeprefix("segmentation_")]) for n, value in beside.items())
    kept = info(str(out))
    assert kept["task"] == "segment"
    assert kept["scores"]["test_miou"] == read_metrics(run)[-1]["test_miou"]
    if head == "linear":  # and it can be tuned on
        assert load_encoder(str(out)).adapters_states == {}


def test_every_value_of_a_recipe_can_be_changed_where_it_is_used(masks: Path, tiny_base: Path, tmp_path: Path) -> None:
    from dataclasses import fields

    from tec_cache.segment.config import OF_RECIPE
    from tec_cache.segment.recipes import SegmentRecipe

    fixed = {"source", "crop", "size", "warmup_epochs"}  # --grid says the size, warm-up is the loop's
    assert {f.name for f in fields(SegmentRecipe)} - fixed == set(OF_RECIPE)
    changes = {"crop_scale": (0.5, 1.0), "colour": (0.0, 0.0, 0.0, 0.0), "grey": 0.5, "blur": 0.1}
    config = segmenting(masks, tiny_base, tmp_path / "r", epochs=1, **changes)
    assert segment(config).finished
    assert segment(config).finished, "it goes on with the same words"
    for wrong, reason in (({"jitter": (0.5, 1.0)}, "not used: --jitter"), ({"colour": (1.0, 1.0, 1.0, 0.6)}, "colour"),
                          ({"crop_scale": (0.5, 2.0)}, "crop-scale")):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            segment(segmenting(masks, tiny_base, tmp_path / "x", **wrong))
    with pytest.raises(ConfigError, match="not used: --crop-scale"):
        segment(segmenting(masks, tiny_base, tmp_path / "x", recipe="ade20k", ignore=255, crop_scale=(0.5, 1.0)))


def words_of(config: SegmentConfig, base: Path) -> list[str]:
    given = options(config)
    at = given.index("--model")
    return ["tec-cache", "segment", str(base), *given[:at], *given[at + 2 :]]


def test_info_says_how_a_run_goes_on_and_that_is_understood(
    masks: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    run = tmp_path / "r"
    segment(segmenting(masks, tiny_base, run, steps=2))
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["tec-cache", "info", str(run), *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr().out
        assert (stop.value.code or 0) == 0, out
        assert ('"head": "linear"' if more else "head linear") in out
    command = shlex.split(info(str(run))["go_on"])
    monkeypatch.setattr(sys, "argv", [*command, "--quiet"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (stop.value.code or 0) == 0, capsys.readouterr()
    assert "steps        15 of 15" in capsys.readouterr().out


def test_predictions_go_nowhere_where_something_else_lies(masks: Path, tiny_base: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "00100.jpg").write_text("original")
    (tmp_path / "file").write_text("a file")
    for place, reason in ((mine, "among other files"), (tmp_path / "file", "is no folder")):
        for dry in (True, False):
            with pytest.raises(ConfigError, match=reason):
                segment(segmenting(masks, tiny_base, tmp_path / "r", save_predictions=str(place)), dry_run=dry)
    assert (mine / "00100.jpg").read_text() == "original"
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match="no local folder"):
        segmenting(masks, tiny_base, tmp_path / "r", save_predictions="s3://bucket/x")
    for _ in range(2):  # its own it may write again
        summary = segment(segmenting(masks, tiny_base, tmp_path / "r", epochs=1, save_predictions=str(tmp_path / "p")))
        assert summary.predictions == str(tmp_path / "p")


def test_a_judgement_that_fails_costs_no_step_and_is_made_up_for(masks: Path, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "test").mkdir(parents=True)
    (folder / "train").symlink_to(masks / "train")
    picture, mask = pair(100)
    write_tar(folder / "test" / "a.tar", [("00100.png", picture[:60]), ("00100.seg.png", mask),
                                          ("00101.png", picture), ("00101.seg.png", mask)])  # fmt: skip
    with pytest.raises(SourceError, match="photo '00100'"):
        segment(segmenting(folder, tiny_base, tmp_path / "r", epochs=1))
    assert checkpoints(tmp_path / "r")[-1].stem == "step-000000005"
    summary = segment(segmenting(folder, tiny_base, tmp_path / "r", epochs=1, on_error="skip"))
    assert (summary.finished, summary.last["step"], summary.last["test_images"]) == (True, 5, 1)
    assert [line["step"] for line in read_metrics(tmp_path / "r")] == [1, 2, 3, 4, 5]
    unbroken = segment(segmenting(folder, tiny_base, tmp_path / "u", epochs=1, on_error="skip"))
    assert summary.last == unbroken.last


def test_fewer_steps_than_were_done_is_done(masks: Path, tiny_base: Path, tmp_path: Path) -> None:
    segment(segmenting(masks, tiny_base, tmp_path / "r", steps=4))
    assert segment(segmenting(masks, tiny_base, tmp_path / "r", steps=3)).finished


def test_every_test_photo_broken_is_told_as_that(masks: Path, tiny_base: Path, tmp_path: Path) -> None:
    _, mask = pair(0)
    write_tar(tmp_path / "in" / "test" / "a.tar", [("a.png", b"no picture"), ("a.seg.png", mask)])
    (tmp_path / "in" / "train").symlink_to(masks / "train")
    with pytest.raises(SourceError, match=r"every photo to be judged on is broken; one: .*photo 'a'"):
        segment(segmenting(tmp_path / "in", tiny_base, tmp_path / "r", epochs=1, on_error="skip"))


def test_upernet_is_refused_where_it_would_see_one_photo(masks: Path, tmp_path: Path) -> None:
    base = Path("random:vit_tiny_patch16_224")
    for changes in ({"micro_batch": 1}, {"batch_size": 1}):
        with pytest.raises(ConfigError, match="upernet normalizes over photos"):
            segment(segmenting(masks, base, tmp_path / "r", head="upernet", grid=2, **changes))
    assert not (tmp_path / "r").exists()


def test_a_finetuned_export_can_be_segmented_with_its_norm_of_tokens_is_new(
    masks: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    labelled = _labelled(tmp_path)
    finetune(tuning(masks, tiny_base, tmp_path / "f", train=str(labelled), test=None, select=0.25, epochs=1))
    export(tmp_path / "f", tmp_path / "e")
    run = tmp_path / "r"
    summary = segment(
        segmenting(masks, tmp_path / "e", run, epochs=1, steps=1, base_lr=0.0, weight_decay=0.0, grid=None)
    )
    assert summary.steps == 1
    ours, theirs = last_checkpoint(run)["model"], load_file(tmp_path / "e" / "model.safetensors")
    kept = [name for name in theirs if not name.startswith(("fc_norm.", "head."))]
    assert len(kept) > 30
    assert all(torch.equal(ours[f"vit.{name}"], theirs[name]) for name in kept)
    assert (ours["vit.norm.weight"] == 1).all()
    assert segment(segmenting(masks, tmp_path / "e", tmp_path / "r6", epochs=1, grid=6)).finished
    with pytest.raises(TecCacheError, match="fine-tuned"):  # as a base it is still none
        finetune(tuning(masks, tmp_path / "e", tmp_path / "x", train=str(labelled), test=None, select=0.25))
