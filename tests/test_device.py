"""What a GPU is told, and what is noted of it, seen on a CPU through stand-ins for the calls of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import pipelines.extraction.prepare_targets
import pipelines.training.running
from pipelines.extract import extract
from pipelines.train import train
from tec_cache.cache.opening import open_cache
from tec_cache.device import device_notes, own_stream, resolve_compute
from tec_cache.loader import Loader
from tec_cache.pinned import ALIGNMENT, PinnedSlabs
from tec_cache.run.settings import load_settings
from tec_cache.student.blocks import draws, run_block
from tests.conftest import tiny_config, tiny_training

NOTES = {"gpu": "NVIDIA H100 80GB HBM3", "cuda": "13.0", "cudnn": "91002"}


@pytest.fixture
def precise() -> Iterator[None]:
    """Torch's own settings, whatever a test makes of them."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("precise")
def test_float32_is_float32_in_products_and_convolutions() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    resolve_compute("cpu", "bfloat16")
    assert torch.backends.cudnn.allow_tf32
    resolve_compute("cpu", "float32")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_a_threads_stream_is_entered_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever enters it on device 0 is sent back there at its end."""
    seen: list[Any] = []

    @contextmanager
    def entered(stream: Any) -> Iterator[None]:
        seen.append(("stream", stream))
        yield

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(("device", device)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    third = torch.device("cuda:3")
    with own_stream(third):
        assert seen == [("device", third), ("stream", third)]
    seen.clear()
    with own_stream(torch.device("cpu")):
        assert seen == []


def test_runs_and_target_sets_note_the_gpu_and_its_libraries(
    shards: Path, tiny_base: Path, made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They decide the last bits, and nothing else: a run goes on elsewhere."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(pipelines.extraction.prepare_targets, "device_notes", lambda _: NOTES)
        patch.setattr(pipelines.training.running, "device_notes", lambda _: NOTES)
        extract(tiny_config(shards, tmp_path / "cache", tiny_base))
        train(tiny_training(made_cache, run, steps=3))
    target = open_cache(tmp_path / "cache")["tiny"].manifest
    assert target["notes"].items() >= NOTES.items()
    assert target["identity"] == open_cache(made_cache)["tiny"].manifest["identity"]
    assert load_settings(run)["notes"].items() >= (NOTES | {"torch": str(torch.__version__)}).items()
    assert train(tiny_training(made_cache, run, steps=6)).steps == 6
    assert device_notes(torch.device("cpu")) == {}


def test_pinned_memory_is_asked_for_in_powers_of_two_and_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    empty = torch.empty

    def pinned(size: Any, *, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        if pin_memory:
            asked.append(int(size))
        return empty(size, dtype=dtype)

    slabs = PinnedSlabs()
    monkeypatch.setattr(torch, "empty", pinned)
    parts = [slabs.empty((100, 3, 7), torch.float32) for _ in range(50)]
    for number, part in enumerate(parts):
        part.fill_(number)
    assert [int(part[0, 0, 0]) for part in parts] == list(range(50)), "none lies on another"
    assert all(part.is_contiguous() for part in parts)
    assert all(size & (size - 1) == 0 for size in asked), "torch would round them up"
    assert sum(asked) < 1.5 * 50 * 100 * 3 * 7 * 4
    assert slabs.empty((), torch.int64).shape == ()
    large = slabs.empty((asked[0], 5), torch.uint8)
    assert large.shape == (asked[0], 5)
    assert ALIGNMENT % torch.float64.itemsize == 0


def test_all_that_a_loader_hands_over_is_pinned(made_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels too: the copy of one pageable tensor makes the host wait."""
    given: set[int] = set()

    def empty(self: PinnedSlabs, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        part = torch.empty(shape, dtype=dtype)
        given.add(part.data_ptr())
        return part

    monkeypatch.setattr(PinnedSlabs, "empty", empty)
    cache = open_cache(made_cache)
    loader: Loader[Any] = Loader(cache, cache["tiny"], batch_size=8, pixel_sizes=(32, 16), pin_memory=True)
    (batch,) = loader.batches(0, 1)
    tensors = list(batch.tensors())
    assert len(tensors) >= 5
    assert {tensor.data_ptr() for tensor in tensors} <= given


RATES = ({}, {"drop_path_rate": 0.5}, {"proj_drop_rate": 0.5}, {"attn_drop_rate": 0.5})


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_only_blocks_that_draw_keep_the_generators_state(
    rates: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those draw the same the second time."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=3, num_heads=3, num_classes=0, **rates)
    assert draws(model.blocks) is bool(rates)
    kept: list[bool] = []
    state = torch.get_rng_state

    def counted() -> torch.Tensor:
        kept.append(True)
        return state()

    tokens = torch.randn(4, 5, 48)
    gradients: list[torch.Tensor] = []
    for checkpointing in (False, True):
        block: nn.Module = model.blocks[-1]
        block.zero_grad()
        torch.manual_seed(1)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_rng_state", counted)
            run_block(
                block, tokens.clone().requires_grad_(), checkpointing, draws=draws(block)
            ).square().sum().backward()
        gradients.append(block.get_parameter("attn.qkv.weight").grad.clone())  # type: ignore[union-attr]
    assert torch.equal(*gradients)
    assert bool(kept) is bool(rates)
