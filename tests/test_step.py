"""One training step: what it may spend, and what it must not change."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.train import prepare_student, train
from tec_cache.cache.opening import open_cache
from tec_cache.config import TrainConfig
from tec_cache.device import Compute, default_workers
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, IdentityError, TecCacheError
from tec_cache.loader import Batch, Loader
from tec_cache.run.compiling import explained_compiling
from tec_cache.run.feed import on_device
from tec_cache.run.loop import Loop
from tec_cache.run.metrics import read_metrics
from tec_cache.student.masking import mask_noise
from tec_cache.student.model import create_student
from tec_cache.tasks.pretrain import MaskedBatch, Pretrain, noise_of
from tec_cache.types import Targets, TargetSpec
from tests.conftest import last_checkpoint, tiny_training

SPEC = TargetSpec(grid=4, channels=12, num_heads=3, k=3, normalization="patch")
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
SMALL_DECODER = {"decoder_width": 16, "decoder_heads": 2}


def example(views: int) -> tuple[torch.Tensor, Targets]:
    torch.manual_seed(1)
    rows = torch.stack([torch.randperm(16)[:3] for _ in range(views)])
    return torch.randn(views, 3, 32, 32), Targets(torch.randn(views, 16, 12), torch.randn(views, 3, 4, 16), rows)


def pretraining(cache: Path, run: Path, **changes: Any) -> tuple[Pretrain, Loop[MaskedBatch]]:
    config, opened = tiny_training(cache, run, epochs=17, **changes), open_cache(cache)
    compute = Compute(torch.device("cpu"), "float32")
    task = Pretrain(config, opened, *prepare_student(config, opened, compute), compute, Ranks())
    return task, Loop(task, config, compute, Ranks())


def gradients(model: torch.nn.Module, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(losses.values()).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_several_masks_of_a_view_are_the_mean_of_a_step_for_each() -> None:
    student = create_student("vit_tiny_patch16_224", targets=SPEC, model_args=TINY, **SMALL_DECODER)
    images, targets = example(3)
    noise = torch.rand(2 * 3, 16)
    together = student(images, targets, noise=noise)
    whole = gradients(student, student(images, targets, noise=noise))
    parts = [student(images, targets, noise=part) for part in noise.chunk(2)]
    apart = [gradients(student, student(images, targets, noise=part)) for part in noise.chunk(2)]
    for name, value in together.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2)
        assert abs(parts[0][name] - parts[1][name]) > 1e-4, "two masks give two losses"
    for name, value in whole.items():
        torch.testing.assert_close(value, (apart[0][name] + apart[1][name]) / 2, atol=1e-5, rtol=1e-4)


def test_the_task_draws_each_mask_of_a_view_from_its_number(made_cache: Path) -> None:
    cache = open_cache(made_cache)
    loader: Loader[Batch] = Loader(cache, (), batch_size=8, pixel_sizes=(32,), seed=5)
    (batch,) = loader.batches(13, 14)
    noise = noise_of(batch, 16, seed=5, masks=3)
    assert noise.shape == (24, 16)
    for mask, part in enumerate(noise.chunk(3)):
        expected = mask_noise(batch.sample_keys, seed=5, epoch=1, num_tokens=16, mask_number=mask)
        assert torch.equal(part, expected)
    assert len({tuple(row) for row in noise.tolist()}) == 24


def test_a_step_of_several_masks_reads_fewer_views_and_belongs_to_the_run(made_cache: Path, tmp_path: Path) -> None:
    (one, _), (four, _) = (
        pretraining(made_cache, tmp_path / "a"),
        pretraining(made_cache, tmp_path / "b", masks_per_view=4),
    )
    assert (one.loader.batch_size, four.loader.batch_size) == (32, 8)
    assert four.loader.steps_per_epoch == 4 * one.loader.steps_per_epoch
    train(tiny_training(made_cache, tmp_path / "r", epochs=17, steps=2, masks_per_view=4))
    with pytest.raises(IdentityError, match="masks_per_view"):
        train(tiny_training(made_cache, tmp_path / "r", epochs=17, steps=3, masks_per_view=2))
    micro = tmp_path / "micro"
    train(tiny_training(made_cache, micro, epochs=17, steps=2, masks_per_view=4, micro_batch=8))
    whole, parts = (read_metrics(run)[-1]["loss"] for run in (tmp_path / "r", micro))
    assert whole == pytest.approx(parts, rel=2e-5)
    with pytest.raises(ConfigError, match="masks for each view"):
        train(tiny_training(made_cache, tmp_path / "x", masks_per_view=3))
    with pytest.raises(ConfigError, match="micro-batches of 2, 4 masks"):
        train(tiny_training(made_cache, tmp_path / "x", masks_per_view=4, micro_batch=2))


def kept_bytes(student: torch.nn.Module, images: torch.Tensor, targets: Targets, noise: torch.Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = student(images, targets, noise=noise)
        total = sum(seen.values())
        del losses
    return total


def test_checkpointing_keeps_less_and_changes_nothing() -> None:
    images, targets = example(4)
    noise = torch.rand(4, 16)
    plain, saving = (
        create_student("vit_tiny_patch16_224", targets=SPEC, model_args=TINY, checkpointing=c, **SMALL_DECODER)
        for c in (False, True)
    )
    ours, theirs = (gradients(s, s(images, targets, noise=noise)) for s in (saving, plain))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert kept_bytes(saving, images, targets, noise) < 0.6 * kept_bytes(plain, images, targets, noise)


def test_checkpointing_and_compiling_are_free_to_change_in_a_run(made_cache: Path, tmp_path: Path) -> None:
    """Compiled kernels round otherwise, so the losses agree but for the last digits; the checkpoint is the same."""
    # one block each: compiling takes the longer, the more there are
    small: dict[str, Any] = {"student_args": TINY | {"depth": 1}, "decoder_depth": 1, "adapters": "input", "epochs": 17}
    for name, more in (("plain", {}), ("compiled", {"compile": True})):
        train(tiny_training(made_cache, tmp_path / name, steps=2, **small, **more))
        train(tiny_training(made_cache, tmp_path / name, steps=3, checkpointing=True, **small))
    plain, compiled = ([line["loss"] for line in read_metrics(tmp_path / n)] for n in ("plain", "compiled"))
    np.testing.assert_allclose(compiled, plain, rtol=1e-5)
    states = [last_checkpoint(tmp_path / n)["model"] for n in ("plain", "compiled")]
    assert set(states[0]) == set(states[1])


def test_what_cannot_be_compiled_says_what_to_do() -> None:
    with pytest.raises(TecCacheError, match="cannot be compiled here: no compiler") as error:
        with explained_compiling():
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nand much more")
    assert error.value.todo == "leave out --compile"


class _HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers asked for, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("quality", ["made_cache", "coded_cache"])
def test_a_step_asks_the_device_for_no_number(
    quality: str, clip: float | None, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, ours = pretraining(request.getfixturevalue(quality), tmp_path, clip_grad=clip, micro_batch=16)
    batches = task.batches(0, 3)
    with monkeypatch.context() as patch:
        patch.setattr(ours, "require_finite", lambda step: None)  # on a GPU only before a log or a checkpoint
        ours.train_step(batches)
        with _HostReads() as reads:
            ours.train_step(batches)
    # the optimizer's step count, which on a CPU it keeps on the host
    assert [name for name in reads.found if "nonzero" in name] == []
    with _HostReads() as seen:
        ours.require_finite(1)
    assert seen.found, "the check itself does ask"
    assert len(reads.found) == 0


def test_a_batch_is_copied_before_it_is_used_and_its_memory_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU, told by fakes: no GPU runs these tests."""
    events: list[tuple[str, int]] = []

    class Tensor:
        def __init__(self, number: int) -> None:
            self.number = number

        def record_stream(self, stream: Any) -> None:
            assert stream is current
            events.append(("kept for", self.number))

    class HostBatch:
        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device: torch.device) -> HostBatch:
            assert side.active
            events.append(("copy", self.number))
            side.last = self.number
            return self

        def tensors(self) -> list[Tensor]:
            return [Tensor(self.number)]

    side = SimpleNamespace(active=False, last=-1, record_event=lambda: side.last)
    current = SimpleNamespace(wait_event=lambda number: events.append(("wait", number)))

    @contextmanager
    def entered(stream: Any) -> Generator[None, None, None]:
        stream.active = True
        yield
        stream.active = False

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    closed = []

    def batches() -> Generator[Any, None, None]:
        try:
            yield from map(HostBatch, range(5))
        finally:
            closed.append(True)

    used = []
    for batch in on_device(batches(), torch.device("cuda:0")):
        used.append(batch.number)
        events.append(("use", batch.number))  # type: ignore[arg-type]
    assert used == list(range(5))
    for number in range(5):
        waited = events.index(("wait", number))
        assert events.index(("copy", number)) < waited < events.index(("use", number))
        assert ("kept for", number) in events[waited : events.index(("use", number))]
        if number + 2 < 5:
            assert events.index(("copy", number + 2)) < events.index(("use", number)), "two are on their way"
    stopped = on_device(batches(), torch.device("cuda:0"))
    next(stopped)
    stopped.close()
    assert closed == [True, True], "the loader is closed with it"


def test_workers_are_a_processs_share_of_the_cores_beside_a_gpu_and_one_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tec_cache.device.available_cores", lambda: 64)
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert [default_workers(gpu, n) for n in (1, 8, 100)] == [16, 8, 1]
    assert default_workers(cpu, 1) == 1


def test_visible_patches_are_embedded_as_timm_embeds_all_of_them() -> None:
    from tec_cache.student.masking import random_mask

    student = create_student("vit_tiny_patch16_224", targets=SPEC, model_args=TINY, **SMALL_DECODER).double()
    images, _ = example(3)
    mask = random_mask(torch.rand(6, 16), 0.75)
    every = student.encoder.patch_embed(images.double())
    expected = torch.stack([every[row % 3][mask.visible[row]] for row in range(6)])
    torch.testing.assert_close(student.embed_visible(images.double(), mask), expected)


def test_new_settings_are_checked() -> None:
    for wrong in ({"masks_per_view": 0}, {"shuffle_buffer": 0}, {"workers": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", "-")):
            TrainConfig(cache="c", out="r", **wrong)
