"""Checkpoints: what names another run or step, or holds what a run could not have written, is refused."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.export import export
from pipelines.train import train
from tec_cache.errors import TecCacheError
from tec_cache.run.layout import checkpoints
from tests.conftest import last_checkpoint, tiny_training

WEIGHT, NORM = "encoder.blocks.0.attn.qkv.weight", "encoder.norm.weight"


@pytest.fixture(scope="module")
def made_run(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 3 and 6."""
    run = tmp_path_factory.mktemp("runs") / "r"
    train(tiny_training(made_cache, run, steps=6))
    return run


def changed(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a run's last checkpoint anew with something changed, as another program might; return its path."""
    state = last_checkpoint(run)
    change(state)
    path = checkpoints(run)[-1]
    torch.save(state, path)
    return path


def put(*names: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(state: dict[str, Any]) -> None:
        inner: Any = state
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value(inner.get(names[-1])) if callable(value) else value

    return change


def drop(*names: str) -> Callable[[dict[str, Any]], object]:
    def change(state: dict[str, Any]) -> None:
        inner: Any = state
        for name in names[:-1]:
            inner = inner[name]
        del inner[names[-1]]

    return change


def with_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        spoiled = tensor.clone()
        spoiled.view(-1)[-1] = value
        return spoiled

    return change


STUDENT = {
    "NaN": (put("model", WEIGHT, value=with_one(float("nan"))), f"{WEIGHT} of the model is not finite"),
    "infinite": (put("model", NORM, value=with_one(float("-inf"))), f"{NORM} of the model is not finite"),
    "int32": (put("model", WEIGHT, value=lambda t: t.int()), "is .144, 48. int32, it should be .144, 48. float32"),
    "float64": (put("model", WEIGHT, value=lambda t: t.double()), "float64, it should be"),
    "bfloat16": (put("model", NORM, value=lambda t: t.bfloat16()), "bfloat16, it should be"),
    "complex": (put("model", NORM, value=lambda t: t.to(torch.complex64)), "complex64, it should be"),
    "transposed": (put("model", WEIGHT, value=lambda t: t.T), "is .48, 144. float32"),
    "a huge shape": (put("model", NORM, value=lambda t: t[:1].expand(2**40)), "1099511627776"),
    "sparse": (put("model", WEIGHT, value=lambda t: t.to_sparse()), "no plain tensor"),
    "no tensor": (put("model", WEIGHT, value=[1.0]), "no plain tensor"),
    "missing": (drop("model", WEIGHT), "the model lacks 1: encoder.blocks.0.attn.qkv.weight"),
    "left over": (put("model", "extra", value=torch.zeros(1)), "the model has besides 1: extra"),
    "a name that is no text": (put("model", 5, value=torch.zeros(1)), "the model has besides 1: 5"),  # type: ignore[arg-type]
    "no weights": (put("model", value={}), "the model lacks"),
    "weights in a list": (put("model", value=list), "model is a list"),
}
WHOLE = {
    "another run": (put("run", value="0" * 64), "another run's"),
    "another format": (put("format", value=1), "of format 1, this program's are of 4"),
    "no format": (drop("format"), "of format 1"),
    "no run": (drop("run"), "not a checkpoint of tec-cache"),
    "a run that is a number": (put("run", value=5), "run is a int"),
    "step -5": (put("step", value=-5), "step -5"),
    "step 0": (put("step", value=0), "step 0"),
    "another step": (put("step", value=5), "of step 5, its name says 6"),
    "step 6.0": (put("step", value=6.0), "step is a float"),
    "step True": (put("step", value=True), "step is a bool"),
    "step as a tensor": (put("step", value=torch.tensor(6)), "step is a Tensor"),
    "step as text": (put("step", value="6"), "step is a str"),
    "a huge step": (put("step", value=2**70), "step 1180591620717411303424"),
    "more than it knows": (put("extra", value=1), "its parts differ in 1: extra"),
    "summed beyond its step": (put("summed", value=7), "7 of them to be averaged"),
    "summed before it began": (put("summed", value=-1), "-1 of them to be averaged"),
}
RESUMED = {
    "no losses": (put("sums", value={}), "the losses lacks"),
    "a loss that is NaN": (put("sums", "loss", value=torch.tensor(float("nan"))), "loss of the losses is not finite"),
    "a loss of another shape": (put("sums", "loss", value=torch.zeros(3)), "loss of the losses is .3,."),
    "a parameter without optimizer": (drop("optimizer", WEIGHT), WEIGHT),
    "an optimizer's parameter too many": (put("optimizer", "extra", value={}), "extra"),
    "an optimizer that is a list": (put("optimizer", value=list), "optimizer is a list"),
    "an entry that is a list": (put("optimizer", NORM, value=list), "entries that are no tables"),
    "an entry that is missing": (drop("optimizer", NORM, "exp_avg"), f"the optimizer's {NORM} lacks 1: exp_avg"),
    "an entry of another shape": (put("optimizer", WEIGHT, "exp_avg", value=lambda t: t[:1]), "exp_avg of"),
    "an entry of another dtype": (put("optimizer", WEIGHT, "exp_avg", value=lambda t: t.half()), "float16"),
    "an entry that is infinite": (put("optimizer", NORM, "exp_avg_sq", value=with_one(float("inf"))), "not finite"),
    "an entry that is negative": (put("optimizer", NORM, "exp_avg_sq", value=with_one(-1.0)), "negative"),
    "an entry of another step": (put("optimizer", NORM, "step", value=torch.tensor(5.0)), "of step 5, the checkpoint"),
}


@pytest.mark.parametrize("fault", STUDENT | WHOLE | RESUMED)
def test_what_a_run_could_not_have_written_is_refused(
    made_cache: Path, made_run: Path, tmp_path: Path, fault: str
) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    change, message = (STUDENT | WHOLE | RESUMED)[fault]
    path = changed(run, change)
    content = path.read_bytes()
    with pytest.raises(TecCacheError, match=message) as error:
        train(tiny_training(made_cache, run, steps=7))
    assert error.value.where == str(path)
    assert error.value.todo == "remove it: step-000000003.pt, the one before it, is then used"
    if fault not in RESUMED:
        with pytest.raises(TecCacheError, match=message):
            export(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert path.read_bytes() == content


def test_without_the_refused_one_the_run_goes_on_from_the_one_before(
    made_cache: Path, made_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    changed(run, put("model", WEIGHT, value=with_one(float("nan")))).unlink()
    train(tiny_training(made_cache, run, steps=6))
    ours, theirs = last_checkpoint(run), last_checkpoint(made_run)
    assert all(torch.equal(value, ours["model"][name]) for name, value in theirs["model"].items())


def test_another_runs_checkpoint_with_the_same_shapes_is_refused_everywhere(
    made_cache: Path, made_run: Path, tmp_path: Path
) -> None:
    for number, changes in enumerate(({"seed": 1}, {"base_lr": 1e-3}, {"mask_ratio": 0.5}, {"tau": 0.5}, {"views": 1})):
        other, run = tmp_path / f"other{number}", Path(shutil.copytree(made_run, tmp_path / f"r{number}"))
        train(tiny_training(made_cache, other, steps=7, **changes))
        shutil.copy(checkpoints(other)[-1], run / "checkpoints")
        with pytest.raises(TecCacheError, match="another run's") as error:
            train(tiny_training(made_cache, run, steps=8))
        assert "step-000000006.pt, the one before it" in error.value.todo
        with pytest.raises(TecCacheError, match="another run's") as error:
            export(run, tmp_path / "out", checkpoint=shutil.copy(checkpoints(other)[-1], tmp_path / "best.pt"))
        assert "another --checkpoint" in error.value.todo


def test_what_only_changes_how_fast_the_numbers_come_is_the_same_run(
    made_cache: Path, made_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    free = {"workers": 2, "micro_batch": 16, "save_every": 0.5, "log_every": 3, "checkpointing": True}
    assert train(tiny_training(made_cache, run, steps=8, **free)).finished
    renamed = shutil.copy(checkpoints(run)[-1], tmp_path / "best.pt")
    export(run, tmp_path / "out", checkpoint=renamed)


def test_an_older_checkpoint_renamed_newer_is_refused(made_cache: Path, made_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    (run / "checkpoints" / "step-000000003.pt").rename(run / "checkpoints" / "step-000000009.pt")
    for attempt in (lambda: train(tiny_training(made_cache, run, steps=10)), lambda: export(run, tmp_path / "out")):
        with pytest.raises(TecCacheError, match="of step 3, its name says 9") as error:
            attempt()
        assert "step-000000006.pt, the one before it" in error.value.todo


def test_where_none_is_left_the_run_begins_anew(made_cache: Path, made_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    (run / "checkpoints" / "step-000000003.pt").unlink()
    path = changed(run, put("step", value=-5))
    with pytest.raises(TecCacheError) as error:
        train(tiny_training(made_cache, run, steps=7))
    assert error.value.todo == "remove it: there is none before it, so the run then begins anew"
    path.unlink()
    train(tiny_training(made_cache, run, steps=6))
    ours, theirs = last_checkpoint(run), last_checkpoint(made_run)
    assert all(torch.equal(value, ours["model"][name]) for name, value in theirs["model"].items())


def test_a_step_beyond_the_runs_end_is_refused(made_cache: Path, made_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    state = last_checkpoint(run)
    for entry in state["optimizer"].values():
        entry["step"].fill_(1000)
    torch.save(state | {"step": 1000}, run / "checkpoints" / "step-000001000.pt")
    with pytest.raises(TecCacheError, match="of step 1000, the run has 30"):
        train(tiny_training(made_cache, run, steps=7))


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch EXECUTED",)


def test_nothing_of_a_checkpoint_is_executed_or_unpacked(
    made_cache: Path, made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    whole = checkpoints(run)[-1].read_bytes()

    def packed(path: Path) -> None:
        with zipfile.ZipFile(path) as old:
            members = {info.filename: old.read(info) for info in old.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in members.items():
                new.writestr(name, data)

    faults: dict[str, Callable[[Path], object]] = {
        "code in it": lambda path: torch.save(last_checkpoint(made_run) | {"extra": Evil()}, path),
        "nothing but code": lambda path: torch.save(Evil(), path),
        "an old pickle": lambda path: torch.save(Evil(), path, _use_new_zipfile_serialization=False),
        "packed members": packed,
        "a tensor": lambda path: torch.save(torch.zeros(3), path),
        "empty": lambda path: path.write_bytes(b""),
        "half": lambda path: path.write_bytes(whole[: len(whole) // 2]),
        "text": lambda path: path.write_bytes(b"weights"),
    }
    for fault, harm in faults.items():
        path = checkpoints(run)[-1]
        path.write_bytes(whole)
        harm(path)
        for attempt in (lambda: train(tiny_training(made_cache, run, steps=7)), lambda: export(run, tmp_path / "out")):
            with pytest.raises(TecCacheError) as error:
                attempt()
            assert error.value.where == str(path), fault
    assert not (tmp_path / "EXECUTED").exists()


def test_only_checkpoints_that_name_the_run_make_room_for_new_ones(
    made_cache: Path, made_run: Path, tmp_path: Path
) -> None:
    run, other = Path(shutil.copytree(made_run, tmp_path / "r")), tmp_path / "other"
    train(tiny_training(made_cache, other, steps=2, seed=1))
    shutil.copy(checkpoints(other)[0], run / "checkpoints" / "step-000000002.pt")
    (run / "checkpoints" / "step-000000001.pt").write_bytes(b"another program's")
    summary = train(tiny_training(made_cache, run, steps=12))
    assert [int(p.stem[5:]) for p in checkpoints(run)] == [1, 2, 9, 12]
    assert summary.finished
