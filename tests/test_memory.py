"""Micro-batches that fit without being asked for, and what is said where memory does not suffice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cli import explained
from pipelines.extract import extract
from pipelines.probe import probe
from pipelines.train import train
from pipelines.training.running import with_micro_batch
from tec_cache.base.model import FrozenBase
from tec_cache.config import ProbeConfig, TrainConfig
from tec_cache.device import Compute
from tec_cache.distributed import Ranks
from tec_cache.errors import TecCacheError
from tec_cache.memory import is_out_of_memory
from tec_cache.run.layout import checkpoints
from tec_cache.run.loop import Loop
from tec_cache.run.micro_batches import count_micro_batches, fitting
from tec_cache.run.settings import load_settings
from tests.conftest import last_checkpoint, tiny_config, tiny_training

CPU, GPU = Compute(torch.device("cpu"), "float32"), Compute(torch.device("cuda:0"), "bfloat16")


def config(batch_size: int, masks: int = 1, **more: Any) -> TrainConfig:
    return TrainConfig(cache="c", out="r", batch_size=batch_size, masks_per_view=masks, **more)


@pytest.mark.parametrize(
    ("batch", "ranks", "masks", "expected"),
    [
        (4096, 1, 1, 512), (4096, 8, 1, 512), (4096, 16, 1, 256), (96, 1, 1, 96), (1, 1, 1, 1),
        (3000, 1, 1, 500), (4096, 1, 4, 512), (4800, 1, 4, 480),
        # 2 x 521: not in pairs; a prime: all of it, if it comes to that
        (1042, 1, 1, 521), (521, 1, 1, 521), (2 * 521 * 4, 1, 4, 2084),
    ],
)  # fmt: skip
def test_the_largest_good_divisor_of_a_processs_share_is_taken(
    batch: int, ranks: int, masks: int, expected: int
) -> None:
    settings, every = config(batch, masks), Ranks(0, 0, ranks)
    size = fitting(settings, every, 512)
    assert size == expected
    assert count_micro_batches(replace(settings, micro_batch=size), every) * size * ranks == batch


def test_a_gpu_gets_what_fits_and_a_cpu_all_of_it(tmp_path: Path) -> None:
    """Unless the run began with another, or one was asked for."""
    new = replace(config(4096), out=str(tmp_path / "none"))
    for compute, ranks, size in ((GPU, Ranks(), 512), (CPU, Ranks(), 4096), (CPU, Ranks(0, 0, 4), 1024)):
        assert with_micro_batch(new, "pretrain", 512, compute, ranks, overwrite=False).micro_batch == size
    asked = replace(new, micro_batch=64)
    assert with_micro_batch(asked, "pretrain", 512, GPU, Ranks(), overwrite=False) == asked


def test_a_run_goes_on_with_the_micro_batch_that_it_began_with(made_cache: Path, tmp_path: Path) -> None:
    """It decides the last bits."""
    run = tmp_path / "run"
    summary = train(tiny_training(made_cache, run, steps=3, micro_batch=8))
    assert summary.micro_batch == 8
    again = train(tiny_training(made_cache, run, steps=6))
    assert again.micro_batch == load_settings(run)["config"]["micro_batch"] == 8
    train(tiny_training(made_cache, tmp_path / "other", steps=6, micro_batch=8))
    ours, theirs = (last_checkpoint(folder)["model"] for folder in (run, tmp_path / "other"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    settings = tiny_training(made_cache, run)
    for ranks, size in ((Ranks(0, 0, 2), 8), (Ranks(0, 0, 8), 4)):
        assert with_micro_batch(settings, "pretrain", 512, GPU, ranks, overwrite=False).micro_batch == size
    assert with_micro_batch(settings, "pretrain", 16, GPU, Ranks(), overwrite=True).micro_batch == 16
    assert train(tiny_training(made_cache, tmp_path / "all", steps=1)).micro_batch == 32


def test_a_run_of_an_earlier_program_goes_on_with_its_whole_share(made_cache: Path, tmp_path: Path) -> None:
    """That one wrote null where nothing was asked for, and knew no --save-minutes."""
    run = tmp_path / "run"
    train(tiny_training(made_cache, run, steps=3))
    settings = json.loads((run / "run.json").read_text())
    settings["config"]["micro_batch"] = None
    del settings["config"]["save_minutes"]
    (run / "run.json").write_text(json.dumps(settings))
    with_gpu = with_micro_batch(tiny_training(made_cache, run), "pretrain", 8, GPU, Ranks(), overwrite=False)
    assert with_gpu.micro_batch == 32
    assert train(tiny_training(made_cache, run, steps=6)).steps == 6


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB")
OUT_ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("error", [OUT, OUT_ON_CPU, MemoryError()])
@pytest.mark.parametrize(
    ("changes", "todo"),
    [
        ({}, "give --micro-batch 16, or keep less of each block with --checkpointing"),
        ({"micro_batch": 8, "checkpointing": True}, "give --micro-batch 4"),
        ({"micro_batch": 8, "masks_per_view": 4}, "give --micro-batch 4, or"),
        ({"micro_batch": 1}, "use more processes, or a GPU with more memory"),
    ],
)
def test_a_training_names_the_micro_batch_to_give(
    error: Exception, changes: Any, todo: str, made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(Loop, "losses", out)
    size = changes.get("micro_batch", 32)
    with pytest.raises(TecCacheError, match=f"memory does not suffice for a micro-batch of {size} at step 1") as found:
        train(tiny_training(made_cache, tmp_path / "run", **changes))
    assert found.value.todo.startswith(todo)
    assert "--checkpointing" not in found.value.todo or not changes.get("checkpointing")
    assert found.value.where == "cpu"
    assert checkpoints(tmp_path / "run") == []


def test_an_update_that_does_not_fit_says_so(made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out(*_: Any, **__: Any) -> Any:
        raise OUT

    monkeypatch.setattr(torch.optim.AdamW, "step", out)
    with pytest.raises(TecCacheError, match="memory does not suffice for the optimizer's state"):
        train(tiny_training(made_cache, tmp_path / "run"))


def test_another_error_stays_what_it_is(made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Loop, "losses", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as error:
        train(tiny_training(made_cache, tmp_path / "run"))
    assert not isinstance(error.value, TecCacheError)
    assert not is_out_of_memory(error.value)


def test_extraction_and_probe_name_the_batch_size_to_give(
    shards: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*_: Any, **__: Any) -> Any:
        raise OUT

    monkeypatch.setattr(FrozenBase, "forward", out)
    with pytest.raises(TecCacheError, match="the base on 8 views at once") as error:
        extract(tiny_config(shards, tmp_path / "cache", tiny_base))
    assert error.value.todo == "give --batch-size 4"
    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.forward_features", out)
    judged = ProbeConfig(model=str(tiny_base), train=str(shards), test=str(shards), device="cpu", batch_size=10)
    with pytest.raises(TecCacheError, match="the model on 10 images at once") as error:
        probe(judged)
    assert error.value.todo == "give --batch-size 5"


def test_nowhere_is_it_called_a_bug() -> None:
    for error in (OUT, OUT_ON_CPU, MemoryError()):
        assert "bug" not in str(explained(error))
        assert "--micro-batch" in explained(error).todo
    assert "bug in tec-cache" in explained(ValueError("5")).todo
