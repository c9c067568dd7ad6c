"""Export: a folder that timm loads, equal to the training encoder, and the base of the next round."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

import tec_cache.run.export
import tests.load_export
from pipelines.export import export, trained_student
from pipelines.extract import extract
from pipelines.train import train
from tec_cache.base.load import load_base
from tec_cache.cache.opening import open_cache
from tec_cache.errors import TecCacheError
from tec_cache.run.export import write_export
from tec_cache.run.layout import checkpoints
from tec_cache.store.files import hash_file
from tec_cache.student.adapters import EncoderAdapters, Mlp
from tec_cache.student.masking import random_mask
from tests import forked
from tests.conftest import TINY, files_below, tiny_config, tiny_training
from tests.faults import Step, Watch
from tests.test_crash import CRASHED, in_child

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for adapters in ("both", "none"):
        train(tiny_training(made_cache, folder / adapters, steps=3, adapters=adapters))
    return {adapters: folder / adapters for adapters in ("both", "none")}


@pytest.mark.parametrize("adapters", ["both", "none"])
def test_timm_loads_the_export_and_gives_the_training_encoders_features(
    runs: dict[str, Path], adapters: str, tmp_path: Path
) -> None:
    out = export(runs[adapters], tmp_path / "out")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    student = trained_student(runs[adapters])[0].eval()
    layers: list[torch.Tensor] = []
    student.encoder.norm.register_forward_hook(lambda *a: layers.append(a[2]))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # with nothing masked, the training encoder sees what timm's model sees, in another order of patches
        noise = torch.arange(16.0).expand(2, -1)
        mask = random_mask(noise, 0.0)
        student.fused(student.forward_layers(images, mask))[0]
        theirs = model.forward_features(images)
    torch.testing.assert_close(theirs, layers[0], rtol=0, atol=1e-5)
    folded = (student.class_token() - student.encoder.cls_token).abs().max()
    assert (folded > 1e-3) == (adapters == "both")


def test_adapters_are_exported_beside_it(runs: dict[str, Path], tmp_path: Path) -> None:
    out = export(runs["both"], tmp_path / "out")
    student = trained_student(runs["both"])[0]
    state = load_file(out / "adapters" / "adapters.safetensors")
    adapters = EncoderAdapters(3, 48, 4 * 32)
    adapters.load_state_dict(below("encoder_adapters.", state), strict=True)
    layers = [torch.randn(2, 5, 48) for _ in range(3)]
    assert torch.equal(adapters(layers), student.encoder_adapters[0](layers))
    mlp, given = Mlp(48, 4 * 48), below("input_adapter.", state)
    token = given.pop("class_token")
    assert torch.equal(token, student.encoder.cls_token)
    mlp.load_state_dict(given, strict=True)
    assert torch.equal(mlp(token), load_file(out / "model.safetensors")["cls_token"])
    assert len(state) == len(adapters.state_dict()) + 5
    assert not (export(runs["none"], tmp_path / "none") / "adapters" / "adapters.safetensors").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["tec_cache"]["step"] == 3
    assert config["tec_cache"]["settings"]["config"]["student"] == "vit_tiny_patch16_224"


def below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("kept", ["input", "encoder"])
def test_either_kind_of_adapter_is_exported_alone(runs: dict[str, Path], kept: str, tmp_path: Path) -> None:
    student = trained_student(runs["both"])[0]
    if kept == "input":
        student.encoder_adapters = torch.nn.ModuleList()
    else:
        student.input_adapter = None
    write_export(student, tmp_path / "out", config={}, encoder_name="vit_tiny_patch16_224", model_args=TINY)
    names = load_file(tmp_path / "out" / "adapters" / "adapters.safetensors")
    assert {name.partition(".")[0] for name in names} == {f"{kept}_adapter" + "s" * (kept == "encoder")}
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).num_classes == 0


def test_an_adapter_that_is_not_finite_is_not_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    student, _ = trained_student(runs["both"])
    with torch.no_grad():
        student.encoder_adapters[0].norm_after.bias[0] = float("nan")
    with pytest.raises(TecCacheError, match=r"encoder_adapters\.norm_after\.bias of the exported adapters"):
        write_export(student, tmp_path / "out", config={}, encoder_name="vit_tiny_patch16_224", model_args=TINY)
    assert not (tmp_path / "out").exists()


def test_the_export_is_the_base_of_the_next_round(
    runs: dict[str, Path], shards: Path, made_cache: Path, tmp_path: Path
) -> None:
    out = export(runs["both"], tmp_path / "round-one")
    base = load_base(str(out), grid=4, k=3)
    assert base.mean == pytest.approx((0.485, 0.456, 0.406))
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    _, blocks = model.forward_intermediates(images, indices=2, output_fmt="NLC")
    torch.testing.assert_close(base(images).features, sum(blocks) / 2, rtol=0, atol=1e-5)
    cache = tmp_path / "c"
    extract(tiny_config(shards, cache, out, views=1))
    assert open_cache(cache).target_names == ["round-one"]
    assert train(tiny_training(cache, tmp_path / "r2", steps=2)).steps == 2


def test_an_export_can_be_a_base_at_another_grid(runs: dict[str, Path], tmp_path: Path) -> None:
    out = export(runs["both"], tmp_path / "out")
    base = load_base(str(out), grid=6, k=3)
    assert base(torch.randn(1, 3, 48, 48)).features.shape == (1, 36, 48)


def test_an_export_loads_in_the_lowest_timm_as_in_the_newest(runs: dict[str, Path], tmp_path: Path) -> None:
    out = export(runs["both"], tmp_path / "out")
    lowest = Path(sys.prefix) / "timm-lowest"
    assert lowest.is_dir(), "make test puts the lowest timm there"
    script = Path(tests.load_export.__file__)
    command = [sys.executable, str(script), str(out), str(tmp_path / "theirs.safetensors")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(lowest)}, check=True, timeout=300)
    with safe_open(tmp_path / "theirs.safetensors", "pt") as file:
        used = file.metadata()["timm"]
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"timm>={used}" in bounds
    theirs, ours = load_file(tmp_path / "theirs.safetensors"), tests.load_export.features(str(out))
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5, msg=lambda text, name=name: name + text)


def test_transformers_loads_an_export_as_timm_does(runs: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModel

    out = export(runs["both"], tmp_path / "out")
    theirs = AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        tokens = theirs(pixel_values=tests.load_export.IMAGES).last_hidden_state
    torch.testing.assert_close(tokens, tests.load_export.features(str(out))["tokens"], rtol=0, atol=1e-5)


def test_the_configuration_names_the_weights(runs: dict[str, Path], tmp_path: Path) -> None:
    for adapters, out in ((name, export(run, tmp_path / name)) for name, run in runs.items()):
        made = json.loads((out / "config.json").read_text())["tec_cache"]
        assert made["model_sha256"] == hash_file(out / "model.safetensors")
        assert made["card_sha256"] == hash_file(out / "README.md")
        if adapters == "both":
            assert made["adapters_sha256"] == hash_file(out / "adapters" / "adapters.safetensors")
        else:
            assert made["adapters_sha256"] is None
            assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_an_export_replaces_another_and_leaves_nothing_of_it(runs: dict[str, Path], tmp_path: Path) -> None:
    for before, after in (("both", "none"), ("none", "both"), ("both", "both")):
        whole = files_below(export(runs[after], tmp_path / f"whole {before}{after}"))
        out = export(runs[before], tmp_path / f"{before}{after}")
        (out / ".model.safetensors.0123456789ab.tmp").write_bytes(b"left by a kill")
        assert files_below(export(runs[after], out, overwrite=True)) == whole
        assert sorted(p.name for p in out.iterdir() if p.is_dir()) == (["adapters"] if after == "both" else [])


FOREIGN = {
    "README.md": b"mine",
    "model.safetensors": save({"head.weight": torch.zeros(2)}, metadata={"format": "pt"}),
    "pytorch_model.bin": b"PK",
    "config.json": b'{"architecture": "vit_tiny_patch16_224", "tec_cache": null}',
    "adapters/adapters.safetensors": b"",
    "adapters/lora.bin": b"",
    "nested/file": b"",
    ".config.json.tmp": b"",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("beside", [False, True])
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(
    runs: dict[str, Path], tmp_path: Path, name: str, beside: bool
) -> None:
    out = tmp_path / "out"
    if beside:
        export(runs["none"], out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(FOREIGN[name])
    before = files_below(out)
    for overwrite in (False, True):
        with pytest.raises(TecCacheError, match="no export of tec-cache") as error:
            export(runs["both"], out, overwrite=overwrite)
        assert (name if "/" not in name or "adapters" in name else "nested") in error.value.what
    assert files_below(out) == before


def test_two_exports_to_one_folder_at_once_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    out = export(runs["both"], tmp_path / "out")
    before = files_below(out)
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(TecCacheError, match="another export is writing"):
        export(runs["none"], out, overwrite=True)
    os.close(handle)
    assert files_below(out) == before
    export(runs["none"], out, overwrite=True)


def crash_everywhere(old: Path, new: Path, folder: Path) -> None:
    """Replace an export by another, die before each step, and look at what is left with timm and with `--base`."""
    before, after = (load_file(export(run, folder / run.name) / "model.safetensors") for run in (old, new))
    whole = files_below(folder / new.name)
    out = folder / "out"

    def steps() -> None:
        found: list[Step] = []
        Watch(out, found.append)
        export(new, out, overwrite=True)
        (folder / "steps.json").write_text(json.dumps(found))

    def crash(number: int) -> None:
        left = iter(range(number))

        def step(step: Step) -> None:
            if next(left, None) is None:
                if step.action == "sync" and (out / step.path).is_file():
                    os.truncate(out / step.path, (out / step.path).stat().st_size // 2)
                os._exit(CRASHED)

        Watch(out, step)
        export(new, out, overwrite=True)

    def look() -> None:
        states = []
        for load in (lambda: timm.create_model(f"local-dir:{out}", pretrained=True), lambda: load_base(str(out)).model):
            try:
                states.append(load().state_dict())
            except (FileNotFoundError, TecCacheError):
                states.append(None)
        ours, theirs = states
        assert (ours is None) == (theirs is None) == (not (out / "config.json").exists())
        if ours is not None:
            wanted = [state for state in (before, after) if same(state, ours)]
            assert len(wanted) == 1, "a mixture"
            assert theirs["patch_embed.proj.weight"].equal(wanted[0]["patch_embed.proj.weight"])
        seen = "none" if ours is None else "old" if same(before, ours) else "new"
        (folder / "seen").write_text(seen)

    def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return set(state) == set(other) and all(state[n].equal(other[n]) for n in state)

    def again() -> None:
        assert files_below(export(new, out, overwrite=True)) == whole

    assert in_child(lambda: (export(old, out), steps())) == 0
    count, seen = len(json.loads((folder / "steps.json").read_text())), []
    for number in range(count):
        shutil.rmtree(out)
        assert in_child(lambda: export(old, out)) == 0
        assert in_child(lambda n=number: crash(n)) == CRASHED  # type: ignore[misc]
        assert in_child(look) == 0, number
        seen.append((folder / "seen").read_text())
        assert in_child(again) == 0, number
    (folder / "report.json").write_text(json.dumps(seen))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("both", "six heads"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("both", "none"), ("none", "both"))),
    ],
)
def test_a_kill_at_any_step_leaves_the_old_export_or_the_new_one_or_none(
    runs: dict[str, Path], made_cache: Path, tmp_path: Path, old: str, new: str
) -> None:
    if new == "six heads":  # the shapes are the same
        args = TINY | {"num_heads": 6}
        train(tiny_training(made_cache, tmp_path / "runs" / new, steps=1, student_args=args))
    job = forked.start(crash_everywhere, runs[old], runs.get(new, tmp_path / "runs" / new), tmp_path)
    job.join()
    assert job.exitcode == 0
    seen = json.loads((tmp_path / "report.json").read_text())
    assert len(seen) >= 12
    assert list(dict.fromkeys(seen)) == ["old", "none", "new"]


def test_a_class_token_that_overflows_is_not_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    """Every weight is finite, and the input adapter's output is not."""
    student, _ = trained_student(runs["both"])
    with torch.no_grad():
        for parameter in student.input_adapter.parameters():
            parameter.fill_(1e30)
    with pytest.raises(TecCacheError, match="cls_token of the exported model is not finite"):
        write_export(student, tmp_path / "out", config={}, encoder_name="vit_tiny_patch16_224", model_args=TINY)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_old_export(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(runs["both"], tmp_path / "out")
    before = files_below(out)
    for number in range(3):
        syncs = iter(range(number))

        def full(path: Path, syncs: Iterator[int] = syncs) -> None:
            if next(syncs, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(tec_cache.run.export, "sync_file", full)
            with pytest.raises(TecCacheError, match="No space left"):
                export(runs["none"] if number < 2 else runs["both"], out, overwrite=True)
        assert files_below(out) == before


def test_what_cannot_be_exported_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TecCacheError, match="no run here"):
        export(tmp_path, tmp_path / "out")
    export(runs["both"], tmp_path / "out")
    with pytest.raises(TecCacheError, match="already"):
        export(runs["both"], tmp_path / "out")
    export(runs["both"], tmp_path / "out", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(TecCacheError, match="cannot be written"):
        export(runs["both"], tmp_path / "file" / "out")
    whole = checkpoints(runs["both"])[-1].read_bytes()
    broken = tmp_path / "step-000000001.pt"
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TecCacheError, match="damaged checkpoint"):
        export(runs["both"], tmp_path / "out2", checkpoint=broken)
    os.mkfifo(tmp_path / "pipe")
    for checkpoint, message in ((tmp_path / "gone.pt", "no such checkpoint"), (tmp_path / "pipe", "is a file")):
        with pytest.raises(TecCacheError, match=message):
            export(runs["both"], tmp_path / "out2", checkpoint=checkpoint)
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "run.json")
    with pytest.raises(TecCacheError, match="not a regular file"):
        export(tmp_path / "piped", tmp_path / "out2")
