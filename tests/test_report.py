"""`tec-cache report`: a page that needs nothing but itself, whose numbers are those of the folders and models."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cli
from pipelines.export import export, trained_student
from pipelines.extract import extract
from pipelines.finetune import finetune
from pipelines.pack import pack
from pipelines.report import ReportConfig, ReportSummary, report
from pipelines.reporting.costs import costs_of
from pipelines.reporting.crops import chosen_crops, decoded_features, exact_features
from pipelines.reporting.judged import judge_classifier, judge_segmenter
from pipelines.reporting.logged import read_logged
from pipelines.reporting.models import model_of
from pipelines.reporting.subjects import letter_of, open_subjects
from pipelines.segment import segment
from pipelines.train import train
from tec_cache.base.load import load_base
from tec_cache.cache.opening import open_cache
from tec_cache.config import TrainConfig
from tec_cache.device import Compute
from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.flops import base_macs
from tec_cache.run.metrics import read_metrics
from tec_cache.segment.config import SegmentConfig
from tests.browser import BROWSER, browser
from tests.conftest import TINY, encoded, payload_of, photo, tiny_config, tiny_training, write_shards, write_tar
from tests.report_page import Page, require_self_contained
from tests.test_masks import write_pairs

CPU = Compute(torch.device("cpu"), "float32")
DEEP = TINY | {"depth": 6}
"""Deep enough for two encoder adapters."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reported")


@pytest.fixture(scope="module")
def cache(folder: Path, coded_cache: Path, tiny_base: Path) -> Path:
    """Two views of 97 photos, with a coded and an exact target set."""
    shutil.copytree(coded_cache, folder / "cache")
    extract(tiny_config(None, folder / "cache", tiny_base, name="exact"))
    return folder / "cache"


@pytest.fixture(scope="module")
def one(folder: Path, cache: Path) -> Path:
    """A run of one target set, finished."""
    train(tiny_training(cache, folder / "one", target="tiny", student_args=DEEP, epochs=2))
    return folder / "one"


@pytest.fixture(scope="module")
def both(folder: Path, cache: Path) -> Path:
    """A run of two target sets, stopped after 4 of its 6 steps."""
    changes = {"target": ("tiny", "exact:0.5"), "base_lr": 1e-3, "weight_decay": 0.01, "steps": 4}
    train(tiny_training(cache, folder / "both", student_args=DEEP, epochs=2, **changes))
    return folder / "both"


@pytest.fixture(scope="module")
def exported(folder: Path, one: Path) -> Path:
    return export(one, folder / "export")


@pytest.fixture(scope="module")
def labelled(folder: Path) -> Path:
    write_shards(folder / "labelled" / "train", [24])
    write_shards(folder / "labelled" / "test", [13], start=100)
    return folder / "labelled"


def tune(labelled: Path, model: Path, run: Path, **changes: Any) -> Path:
    shared: dict[str, Any] = {"device": "cpu", "threads": 1, "workers": 1, "log_every": 1, "save_minutes": 0.0}
    photos = {"train": str(labelled / "train"), "test": str(labelled / "test")}
    values: dict[str, Any] = shared | photos | {"epochs": 2, "batch_size": 8} | changes
    finetune(FinetuneConfig(model=str(model), out=str(run), **values))
    return run


@pytest.fixture(scope="module")
def tuned(folder: Path, labelled: Path, exported: Path) -> Path:
    return tune(labelled, exported, folder / "tuned", recipe="small")


@pytest.fixture(scope="module")
def masks(folder: Path) -> Path:
    write_pairs(folder / "masks" / "train" / "a.tar", 12)
    write_pairs(folder / "masks" / "test" / "a.tar", 5, start=100)
    return folder / "masks"


@pytest.fixture(scope="module")
def segmented(folder: Path, masks: Path, exported: Path) -> Path:
    shared: dict[str, Any] = {"device": "cpu", "threads": 1, "workers": 1, "log_every": 1, "save_minutes": 0.0}
    photos = {"train": str(masks / "train"), "test": str(masks / "test"), "save_predictions": str(folder / "seen")}
    segment(SegmentConfig(model=str(exported), out=str(folder / "segmented"), epochs=2, batch_size=6, base_lr=0.05,
                          layer_decay=1.0, **photos, **shared))  # fmt: skip
    return folder / "segmented"


def reported(out: Path, *places: Path | str, **changes: Any) -> tuple[ReportSummary, Page]:
    config = ReportConfig(
        **{"places": tuple(map(str, places)), "out": str(out), "images": 2, "device": "cpu"} | changes
    )
    summary = report(config)
    assert summary.bytes == out.stat().st_size
    page = Page(out)
    require_self_contained(page)
    return summary, page


@pytest.fixture(scope="module")
def whole(
    folder: Path, one: Path, both: Path, cache: Path, exported: Path, tiny_base: Path
) -> tuple[ReportSummary, Page]:
    return reported(folder / "report.html", one, both, cache, exported, base=str(tiny_base))


# ---- the page ------------------------------------------------------------------------------------------------


def test_the_page_has_all_its_parts_and_they_are_whole(whole: tuple[ReportSummary, Page]) -> None:
    summary, page = whole
    assert summary.problems == []
    assert list(page.sections) == ["part-pretrain", "part-costs", "part-exports", "part-models", "part-cache-C"]
    for part in ("Losses", "Learning rate, gradient and speed", "Settings that differ"):
        assert part in page.sections["part-pretrain"]
    for part in ("Attention of the last block", "How alike the tokens are", "Shares of the encoder adapters"):
        assert part in page.sections["part-models"]
    for part in ("Bytes of a view", "Errors of stored targets", "Stored crops", "Targets tiny", "Targets exact"):
        assert part in page.sections["part-cache-C"]
    assert page.row("state")[:2] == ["finished, 6 steps", "step 4 of 6, not finished"]
    assert "prefers-color-scheme: dark" in page.source
    assert "@media print" in page.source
    assert "width=device-width" in page.source


def test_the_same_folders_give_the_same_page_but_for_its_date(
    tmp_path: Path,
    whole: tuple[ReportSummary, Page],
    one: Path,
    both: Path,
    cache: Path,
    exported: Path,
    tiny_base: Path,
) -> None:
    _, again = reported(tmp_path / "r.html", one, both, cache, exported, base=str(tiny_base))

    def undated(page: Page) -> list[str]:
        lines = page.source.splitlines()
        kept = [line for line in lines if 'class="made"' not in line]
        assert len(kept) == len(lines) - 1
        return kept

    assert undated(again) == undated(whole[1])


def test_curves_are_the_logged_numbers_by_term_and_set(
    whole: tuple[ReportSummary, Page], one: Path, both: Path
) -> None:
    """The run of one set is drawn with the run of two where both learn from the same set."""
    page, lines, others = whole[1], read_metrics(one), read_metrics(both)
    wanted = {
        "loss, as it is minimized": ("loss", "loss"),
        "feature loss, target set tiny": ("feature", "tiny/feature"),
        "attention loss, target set tiny": ("attention", "tiny/attention"),
        "feature loss, target set exact": (None, "exact/feature"),
        "norm of the gradient": ("grad_norm", "grad_norm"),
        "learning rate": ("lr", "lr"),
    }
    for title, names in wanted.items():
        (alt,) = page.alts(f"{title} over epochs")
        for letter, name, of in (("A", names[0], lines), ("B", names[1], others)):
            assert (f"{letter} from" in alt) == (name is not None)
            if name is not None:
                values = f"{letter} from {of[0][name]:.4g} to {of[-1][name]:.4g} at epoch {of[-1]['step'] / 3:g}"
                assert values in alt
    assert page.row("last feature loss, target set tiny")[1] == f"{others[-1]['tiny/feature']:.4g}"


def test_exactly_the_settings_that_differ_are_named(whole: tuple[ReportSummary, Page]) -> None:
    rows = whole[1].rows
    start = next(i for i, row in enumerate(rows) if row and row[0] == "setting")
    table = itertools.takewhile(lambda row: row[0], rows[start + 1 :])
    named = {name: cells for name, *cells in table}
    assert set(named) == {"base_lr", "weight_decay", "steps", "target", "targets.1"}
    assert named["base_lr"] == ["0.005", "0.001"]
    assert named["target"] == ["tiny", "tiny, exact:0.5"]
    assert named["targets.1"][0] == "–"  # noqa: RUF001
    assert "weight 0.5" in named["targets.1"][1]


def test_a_run_alone_has_no_table_of_differences(tmp_path: Path, one: Path) -> None:
    _, page = reported(tmp_path / "r.html", one)
    assert "Settings that differ" not in page.sections["part-pretrain"]
    assert page.alts("feature loss over epochs"), "its one set needs no name"


def test_letters_go_on_after_z() -> None:
    assert [letter_of(i) for i in (0, 25, 26, 27, 51, 52, 702)] == ["A", "Z", "AA", "AB", "AZ", "BA", "AAA"]


# ---- costs ---------------------------------------------------------------------------------------------------


def written_run(run: Path, **changes: Any) -> Path:
    """A run of which only run.json is there."""
    run.mkdir(parents=True)
    config = TrainConfig(cache="CACHE", out=str(run), **changes)
    spec = {"grid": 14, "channels": 768, "num_heads": 12, "k": 15, "normalization": "patch", "columns": None}
    targets = [{"kind": "cached", "name": "mae", "fingerprint": "0" * 64, "spec": spec, "tau": 1.8, "weight": 1.0}]
    settings = {"format": 4, "task": "pretrain", "config": dataclasses.asdict(config), "cache": "0" * 64,
                "targets": [of | {"goal": ""} for of in targets], "num_views": 4, "groups": None,
                "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "total_steps": 93_600}  # fmt: skip
    (run / "run.json").write_text(json.dumps(settings))
    return run


def test_the_papers_model_costs_what_the_paper_says(tmp_path: Path) -> None:
    (subject,) = open_subjects([str(written_run(tmp_path / "r"))])
    costs = costs_of(subject, read_logged(tmp_path / "r", subject.about or {}))
    assert (costs.parameters, costs.trained) == (118_594_304, 118_342_144)
    assert costs.gradient_macs / 1e9 == pytest.approx(8.3, rel=0.03), "norms and activations are not counted"
    assert (costs.base_macs, costs.base_calls, costs.images, costs.seconds) == (0, 0, 0, None)


def test_costs_of_real_runs(cache: Path, one: Path, tiny_base: Path, tmp_path: Path) -> None:
    online = tmp_path / "online"
    train(tiny_training(cache, online, online=(str(tiny_base),), k="3", epochs=2, steps=2, masks_per_view=2))
    subjects = open_subjects([str(one), str(online)])
    stored, looped = (costs_of(s, read_logged(s.folder, s.about or {})) for s in subjects)
    student, _ = trained_student(one)
    assert stored.parameters == sum(p.numel() for p in student.parameters())
    macs = base_macs(load_base(str(tiny_base), grid=4, k=3))
    assert (stored.base_macs, stored.base_calls, stored.spared_macs, stored.images) == (0, 0, macs, 6 * 32)
    assert (looped.base_macs, looped.base_calls, looped.images) == (macs, 32, 64)
    assert looped.flop == 2 * (64 * 3 * looped.gradient_macs + 32 * macs)
    assert stored.seconds == pytest.approx(sum(line["seconds"] for line in read_metrics(one)))


# ---- the paper's figures -------------------------------------------------------------------------------------


def test_shares_sum_to_one_and_are_those_of_a_plain_loop(one: Path, both: Path, exported: Path) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    looked = [model_of(subject, CPU) for subject in open_subjects([str(one), str(both), str(exported)])]
    assert [set(of.adapters) for of in looked] == [{""}, {"tiny", "exact"}, {""}]
    for of in looked:
        for shares in of.shares(images).values():
            assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert looked[2].shares(images)[""] == pytest.approx(looked[0].shares(images)[""], abs=1e-6)
    vit: Any = looked[0].model.model
    with torch.no_grad():
        layers = vit.forward_intermediates(images, norm=False, output_fmt="NLC", return_prefix_tokens=True)[1]
        layers = [torch.cat([prefix, patches], dim=1) for patches, prefix in layers]
        layers[-1] = vit.norm(layers[-1])
        student, _ = trained_student(one)
        parts = student.encoder_adapters[0].contributions(layers)  # type: ignore[operator]
    means = [np.mean([np.sqrt((token.numpy() ** 2).sum()) for view in part for token in view]) for part in parts]
    assert looked[0].shares(images)[""] == pytest.approx([mean / sum(means) for mean in means], abs=1e-5)


def test_shares_on_the_page_sum_to_a_hundred_percent(whole: tuple[ReportSummary, Page]) -> None:
    found = whole[1].alts("shares of Z_e")
    assert len(found) == 4, "one, both of both sets, and the export"
    for alt in found:
        assert sum(map(float, re.findall(r"([\d.]+) %", alt))) == pytest.approx(100, abs=0.11)


def test_every_head_of_every_model_is_over_every_picture(whole: tuple[ReportSummary, Page]) -> None:
    for title in ("base tiny", "A · one", "B · both", "D · export"):
        assert len(whole[1].alts(f"attention of all heads of {title} over")) == 2
        for head in range(3):
            assert len(whole[1].alts(f"attention of head {head} of {title} over")) == 2
    pictures = dict(whole[1].pictures)
    run, copy = (pictures[f"attention of head 0 of {of} over p00000"] for of in ("A · one", "D · export"))
    assert run == copy, "an export is the run's model, its input adapter folded"


def test_photos_that_are_given_are_looked_at(tmp_path: Path, one: Path, labelled: Path) -> None:
    summary, page = reported(tmp_path / "r.html", one, photos=str(labelled / "test"), images=3)
    assert summary.problems == []
    assert len(page.alts("attention of all heads")) == 3
    assert "3 pictures of the photos that were given: p00100, p00104, p00108" in page.sections["part-models"]


# ---- caches --------------------------------------------------------------------------------------------------


def test_decoded_targets_stand_beside_the_exact_ones_of_their_base(
    cache: Path, tiny_base: Path, whole: tuple[ReportSummary, Page]
) -> None:
    opened, base = open_cache(cache), load_base(str(tiny_base), grid=4, k=0)
    crops = chosen_crops(opened, 2)
    assert [crop.name for crop in crops] == [f"{key}, view {v}" for key in ("p00000", "p00056") for v in (0, 1)]
    exact = exact_features(opened["exact"], crops, base)
    assert exact is not None
    for number, crop in enumerate(crops):
        assert torch.allclose(decoded_features(opened["exact"], crop)[0], exact[number], atol=5e-3)
        error = (decoded_features(opened["tiny"], crop)[0] - exact[number]).square().sum() / exact[
            number
        ].square().sum()
        assert 1e-3 < error < 0.3, "it is coded"
        shown = [re.search(r"error (\S+)", alt) for alt in whole[1].alts(f"decoded features of {crop.name}")]
        assert any(found and float(found[1]) == pytest.approx(float(error), rel=0.01) for found in shown)
    assert len(whole[1].alts("exact features of")) == 8


def test_another_base_is_not_taken_for_the_sets_own(tmp_path: Path, cache: Path, exported: Path) -> None:
    _, page = reported(tmp_path / "r.html", cache, base=str(exported))
    assert "is not the one that made this set" in page.sections["part-cache-A"]
    assert page.alts("decoded features of")
    assert not page.alts("exact features of")


def test_bytes_and_errors_are_those_of_the_records(whole: tuple[ReportSummary, Page], cache: Path) -> None:
    page, opened = whole[1], open_cache(cache)
    records = [opened["tiny"].record(unit) for unit in opened["tiny"].units]
    size = sum(block[1] for record in records for block in record.blocks["features"]) / (2 * 97)
    assert page.row("targets tiny, quality default")[1] == "194"
    stated = [row for row in page.rows if row and row[0] == "of them features"]
    assert stated[1][1] == (f"{size:.0f} B" if size < 1000 else f"{size / 1000:.1f} KB")
    errors = opened["tiny"].codec_record.errors
    row = page.row("tiny: features, relative squared error")
    assert row[:3] == ["0.04", f"{errors['mse']:.3g}", "yes" if errors["mse"] <= 0.04 else "no"]


def test_a_pack_is_reported_like_its_cache(tmp_path: Path, coded_cache: Path) -> None:
    pack(str(coded_cache), str(tmp_path / "p"))
    summary, page = reported(tmp_path / "r.html", tmp_path / "p")
    assert summary.problems == []
    assert "Pack A · p" in page.sections["part-cache-A"]
    assert page.alts("decoded features of")


def test_skipped_photos_are_named(tmp_path: Path, tiny_base: Path) -> None:
    members = [(f"k{i}.jpg", encoded(photo(i))) for i in range(6)] + [("broken<b>.jpg", b"none")]
    write_tar(tmp_path / "in" / "a.tar", members)
    extract(tiny_config(tmp_path / "in", tmp_path / "c", None, views_only=True, on_error="skip"))
    _, page = reported(tmp_path / "r.html", tmp_path / "c")
    assert page.row("broken<b>")[0]
    assert "1 photo left out" in page.sections["part-cache-A"]


# ---- tuned models --------------------------------------------------------------------------------------------


def test_confusions_count_what_the_run_was_judged_by(tmp_path: Path, tuned: Path, labelled: Path) -> None:
    judged = judge_classifier(tuned, str(labelled / "test"), 500, CPU)
    assert (judged.photos, judged.counts.sum(), judged.counts.shape) == (13, 13, (4, 4))
    assert judged.counts.sum(axis=1).tolist() == [4, 3, 3, 3]
    logged = read_metrics(tuned)[-1]["test_top1"]
    assert np.trace(judged.counts) / 13 == pytest.approx(logged)
    summary, page = reported(tmp_path / "r.html", tuned, photos=str(labelled / "test"))
    assert summary.problems == []
    assert page.row("last top-1 accuracy") == [f"{100 * logged:.2f} %"]
    assert f"{100 * logged:.2f} % of the photos are right" in page.sections["part-classify"]
    assert page.alts("confusions of A · tuned")
    assert page.alts("top-1 accuracy over epochs")


@pytest.mark.parametrize("how", [{"tune": "adapters"}, {"tune": "head"}, {"tune": "full", "rule": "tec"}])
def test_every_way_of_tuning_can_be_judged_again(
    tmp_path: Path, labelled: Path, exported: Path, how: dict[str, str]
) -> None:
    run = tune(labelled, exported, tmp_path / "r", epochs=1, **how)
    judged = judge_classifier(run, str(labelled / "test"), 500, CPU)
    assert np.trace(judged.counts) / 13 == pytest.approx(read_metrics(run)[-1]["test_top1"])
    (subject,) = open_subjects([str(run)])
    assert set(model_of(subject, CPU).adapters) == ({""} if how["tune"] == "adapters" else set())


def test_a_segmentation_shows_confusions_and_overlays(tmp_path: Path, segmented: Path, masks: Path) -> None:
    judged = judge_segmenter(segmented, str(masks / "test"), 500, 2, CPU)
    line = read_metrics(segmented)[-1]
    assert np.trace(judged.counts) / judged.counts.sum() == pytest.approx(line["test_pixel_accuracy"])
    summary, page = reported(tmp_path / "r.html", segmented, photos=str(masks / "test"))
    assert summary.problems == []
    assert f"mean intersection over union {100 * line['test_miou']:.2f} %" in page.sections["part-segment"]
    assert len(page.alts("photo, true classes and predicted classes")) == 4, "two judged now, two that were saved"
    _, without = reported(tmp_path / "w.html", segmented)
    assert len(without.alts("photo, true classes and predicted classes")) == 2, "what the folder holds"
    assert "give photos with labels, or masks, by --photos" in without.sections["part-segment"]


def test_photos_without_labels_are_a_problem_of_one_part(tmp_path: Path, tuned: Path, masks: Path) -> None:
    summary, page = reported(tmp_path / "r.html", tuned, photos=str(masks / "test"))
    assert len(summary.problems) == 1
    assert "no photo has a label" in page.sections["part-classify"]
    assert len(summary.problems[0]) < 300, "not every photo is named"
    assert page.alts("attention of head 0"), "what needs no label is there"


# ---- unfinished and damaged ----------------------------------------------------------------------------------


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    summary, page = reported_without_pictures(tmp_path / "r.html", written_run(tmp_path / "begun"))
    assert "A has logged nothing yet" in page.sections["part-pretrain"]
    assert page.row("state") == ["just begun"]
    assert any("no checkpoint yet" in problem for problem in summary.problems)
    assert "no checkpoint yet" in page.sections["part-models"]


def reported_without_pictures(out: Path, *places: Path) -> tuple[ReportSummary, Page]:
    summary = report(ReportConfig(places=tuple(map(str, places)), out=str(out), device="cpu"))
    return summary, Page(out)


def test_a_run_that_is_writing(tmp_path: Path, one: Path) -> None:
    shutil.copytree(one, tmp_path / "r")
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": 7, "loss": NaN, "grad_norm": 1e999, "lr": "x"}\n{"step": 8, "lo')
    summary, page = reported(tmp_path / "r.html", tmp_path / "r")
    assert summary.problems == []
    assert "2 of the lines of metrics.jsonl cannot be read" in page.sections["part-pretrain"]


def test_damaged_runs_and_exports_are_said_and_the_others_shown(tmp_path: Path, one: Path, exported: Path) -> None:
    shutil.copytree(one, tmp_path / "settings")
    (tmp_path / "settings" / "run.json").write_text("{")
    shutil.copytree(one, tmp_path / "weights")
    for file in (tmp_path / "weights" / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    shutil.copytree(exported, tmp_path / "export")
    (tmp_path / "export" / "model.safetensors").write_bytes(b"none")
    places = [one, *(tmp_path / name for name in ("settings", "weights", "export"))]
    summary, page = reported(tmp_path / "r.html", *places)
    assert "run.json is damaged" in page.sections["part-unreadable"]
    assert "damaged checkpoint" in page.sections["part-models"]
    assert len(summary.problems) == 3
    assert page.alts("attention of head 0 of A · one")
    assert not page.alts("attention of head 0 of C")


def test_an_unfinished_cache(tmp_path: Path, cache: Path) -> None:
    shutil.copytree(cache, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "index", ignore_errors=True)
    record = sorted((tmp_path / "c" / "records" / "targets" / "tiny").rglob("*.json"))[0]
    record.unlink()
    summary, page = reported(tmp_path / "r.html", tmp_path / "c")
    assert summary.problems == []
    assert page.row("missing") == ["1 units of tiny"]
    assert "not finished" in page.row("state")


def test_a_damaged_cache(tmp_path: Path, cache: Path) -> None:
    shutil.copytree(cache, tmp_path / "crops")
    opened = open_cache(tmp_path / "crops")
    tar = payload_of(opened, opened.view_units[0])
    record = opened.views_record(opened.view_units[0])
    data = bytearray(tar.read_bytes())
    data[record.offsets[0] + 200] ^= 255
    tar.write_bytes(data)
    shutil.copytree(cache, tmp_path / "manifest")
    (tmp_path / "manifest" / "cache.json").write_text("{}")
    summary, page = reported(tmp_path / "r.html", tmp_path / "crops", tmp_path / "manifest", cache)
    assert "is damaged" in page.sections["part-cache-A"]
    assert "B · manifest" in page.sections["part-unreadable"]
    assert len(summary.problems) == 2
    assert page.alts("decoded features of"), "the whole one is shown"


def test_a_cache_of_nothing_yet(tmp_path: Path, shards: Path, tiny_base: Path, cache: Path) -> None:
    (tmp_path / "c").mkdir()
    shutil.copy(cache / "cache.json", tmp_path / "c")
    _, page = reported_without_pictures(tmp_path / "r.html", tmp_path / "c")
    assert "It holds no view yet" in page.sections["part-cache-A"]
    assert "It holds no crop yet" in page.sections["part-cache-A"]


# ---- hostile names, secrets, refusals ------------------------------------------------------------------------

EVIL = "<script>alert(1)<|script>\"'&\x1b[31m\u202e"
"""A path's part holds no slash."""


def test_hostile_names_stay_text(tmp_path: Path, tiny_base: Path) -> None:
    evil = EVIL.replace("|", "-")
    members = [(f"{evil}{i}.jpg", encoded(photo(i))) for i in range(4)] + [(f"{evil}-broken.jpg", b"no")]
    write_tar(tmp_path / "in" / "a.tar", members)
    cache = tmp_path / evil
    extract(tiny_config(tmp_path / "in", cache, tiny_base, on_error="skip"))
    train(tiny_training(cache, tmp_path / f"{evil} run", epochs=1, warmup_epochs=0, batch_size=4))
    summary, page = reported(tmp_path / "r.html", cache, tmp_path / f"{evil} run", base=str(tiny_base))
    assert summary.problems == []
    assert "<script" not in page.source.lower().replace("&lt;script", "")
    assert "<script>alert(1)<-script>\"'&\\x1b[31m\\u202e0, view 0" in page.sections["part-cache-A"]
    assert "\x1b" not in page.source
    assert "\u202e" not in page.source


def test_credentials_are_nowhere_on_the_page(tmp_path: Path) -> None:
    run = written_run(tmp_path / "r", probe_every=1, probe_train="x", probe_test="y")
    settings = json.loads((run / "run.json").read_text())
    settings["config"]["cache"] = "https://me:hidden-word@host/CACHE?sig=hidden-signature"
    settings["config"]["probe_train"] = "s3://KEY:hid/den+hidden@bucket/x"
    (run / "run.json").write_text(json.dumps(settings))
    other = written_run(tmp_path / "other")
    _, page = reported_without_pictures(tmp_path / "r.html", run, other)
    assert "https://host/CACHE" in page.source
    assert "s3://bucket/x" in page.source
    for secret in ("hidden-word", "hidden-signature", "hid/den", "den+hidden", "KEY:"):
        assert secret not in page.source


def test_without_matplotlib_nothing_is_written(tmp_path: Path, one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TecCacheError) as caught:
        report(ReportConfig(places=(str(one),), out=str(tmp_path / "r.html")))
    assert "not installed" in caught.value.what
    assert caught.value.where == "tec-cache report"
    assert "pip install" in caught.value.todo
    assert not (tmp_path / "r.html").exists()


def test_only_a_report_is_replaced(tmp_path: Path, one: Path) -> None:
    out = tmp_path / "r.html"
    out.write_text("<p>my diary</p>")
    with pytest.raises(ConfigError, match="no report"):
        report(ReportConfig(places=(str(one),), out=str(out)))
    assert out.read_text() == "<p>my diary</p>"
    with pytest.raises(ConfigError, match="is a folder"):
        report(ReportConfig(places=(str(one),), out=str(tmp_path)))
    out.unlink()
    first, _ = reported(out, one)
    assert report(ReportConfig(places=(str(one),), out=str(out), images=2, device="cpu")).bytes == first.bytes


def test_what_is_nothing_of_ours_is_refused(tmp_path: Path, one: Path) -> None:
    for place, what in ((tmp_path / "gone", "nothing lies here"), (tmp_path, "nothing to report on")):
        with pytest.raises(ConfigError, match=what):
            report(ReportConfig(places=(str(place),), out=str(tmp_path / "r.html")))
    with pytest.raises(ConfigError, match="twice"):
        report(ReportConfig(places=(str(one), str(one)), out=str(tmp_path / "r.html")))
    with pytest.raises(ConfigError, match="none is named"):
        ReportConfig(places=(str(one),), base_weights="w.pth")
    with pytest.raises(ConfigError, match="--images 0"):
        ReportConfig(places=(str(one),), images=0)


def test_the_command(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "r.html"
    words = ["tec-cache", "report", str(one), "--out", str(out), "--images", "1", "--device", "cpu"]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert not stop.value.code, said.err
        if more:
            found = json.loads(said.out)
            assert (found["out"], found["bytes"], found["problems"]) == (str(out), out.stat().st_size, [])
            assert found["sections"] == ["Pretraining", "Time and computing", "What the models see"]
        else:
            assert f"report       {out}" in said.out


# ---- in a browser --------------------------------------------------------------------------------------------


@pytest.mark.skipif(BROWSER is None, reason="there is no browser here")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_all_images_are_there_and_nothing_runs_over(
    whole: tuple[ReportSummary, Page], tmp_path: Path, width: int
) -> None:
    page = tmp_path / "report.html"
    page.write_text(whole[1].source)
    with browser(tmp_path / "profile") as shown:
        seen = shown.look(page, width)
    assert seen["width"] <= seen["inner"]
    assert seen["images"] == len(whole[1].pictures)
    assert (seen["broken"], seen["errors"], seen["fetched"]) == ([], [], [])
