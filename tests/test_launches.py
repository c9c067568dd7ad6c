"""What a training step asks of a device: one graph for torch.compile, and a number of operations that does not grow."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.launches import Operations
from pipelines.extract import extract
from tec_cache.run.feed import on_device
from tec_cache.student.model import Goal, create_student
from tec_cache.types import Targets, TargetSpec
from tests.conftest import tiny_config
from tests.test_step import SMALL_DECODER, SPEC, TINY, example, gradients, pretraining

A_STEP = 400
"""Operations of a step of one micro-batch, with three blocks and two of the decoder: 334 with exact targets, 388 with
decoded ones. Twelve of a ViT-B's blocks, each 40 with its backward pass, make it about 750."""
ONE_MORE = 500
"""Of each further micro-batch: the same, but for the optimizer, and an addition to the gradient of each weight."""

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "index.Tensor_mask")
"""Operations for whose result the host waits."""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_student_is_captured_whole_and_computes_the_same(checkpointing: bool) -> None:
    """`fullgraph` refuses a graph that breaks; without one, torch.compile fuses all that lies between two products."""
    options = SMALL_DECODER | {"checkpointing": checkpointing}
    student = create_student("vit_tiny_patch16_224", targets=SPEC, model_args=TINY, **options)
    images, targets = example(3)
    noise = torch.rand(2 * 3, 16)
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    captured = torch.compile(student, backend=keep, fullgraph=True)
    ours, plain = captured(images, targets, noise=noise), student(images, targets, noise=noise)
    assert all(torch.equal(ours[name], value) for name, value in plain.items())
    theirs = gradients(student, plain)
    for name, gradient in gradients(student, captured(images, targets, noise=noise)).items():
        assert torch.equal(gradient, theirs[name]), name
    captured(images + 1, targets, noise=noise.flip(0))
    assert len(graphs) == 1, "one graph, made once"


def test_a_student_of_several_sets_is_one_graph_too() -> None:
    other = TargetSpec(grid=4, channels=8, num_heads=2, k=5, normalization="patch", class_token=True)
    goals = {"a": Goal(spec=SPEC), "b": Goal(spec=other, tau=0.5)}
    student = create_student("vit_tiny_patch16_224", targets=goals, model_args=TINY, **SMALL_DECODER)
    images, targets = example(3)
    rows = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    more = Targets(torch.randn(3, 16, 8), torch.randn(3, 2, 6, 16), rows, torch.randn(3, 8))
    both, noise = {"a": targets, "b": more}, torch.rand(3, 16)
    torch._dynamo.reset()
    captured = torch.compile(student, backend="eager", fullgraph=True)
    ours, plain = captured(images, both, noise=noise), student(images, both, noise=noise)
    assert set(plain) == {"a/feature", "a/attention", "b/feature", "b/attention", "b/class"}
    assert all(torch.equal(ours[name], value) for name, value in plain.items())


@pytest.mark.parametrize("balance", ["none", "norm"])
def test_steps_of_several_sets_wait_for_the_device_only_where_gradients_are_measured(
    made_cache: Path, tiny_base: Path, tmp_path: Path, balance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "cache"))
    extract(tiny_config(None, cache, tiny_base, name="other", quality="0.05,0.04"))
    monkeypatch.setattr("tec_cache.tasks.gradients.FIRST", 1)  # the step before the one that is looked at
    seen = operations_of_a_step(cache, tmp_path / "run", target=("tiny", "other:0.5"), balance=balance)
    assert [name for name in seen if name.split(".")[1] in WAITS] == []
    monkeypatch.setattr("tec_cache.tasks.gradients.FIRST", 2)
    measured = operations_of_a_step(cache, tmp_path / "run", target=("tiny", "other:0.5"), balance=balance)
    assert measured.total() > 1.2 * seen.total(), "such a step does more, or nothing was measured"


def operations_of_a_step(cache: Path, run: Path, **changes: Any) -> Counter[str]:
    task, loop = pretraining(cache, run, **changes)
    batches = on_device(task.batches(0, 3), torch.device("cpu"))
    loop.require_finite = lambda step: None  # type: ignore[method-assign]  # on a GPU only before a log or a checkpoint
    loop.train_step(batches, check=False)  # makes the optimizer's state, and the codec's constants
    with Operations() as seen:
        loop.train_step(batches, check=False)
    batches.close()
    return seen.counts


@pytest.mark.parametrize("quality", ["made_cache", "coded_cache"])
def test_a_steps_operations_are_so_many_for_each_micro_batch(
    quality: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """They do not depend on how many views a micro-batch has: a loop over views would show."""
    cache = request.getfixturevalue(quality)
    one, two, four, small = (
        operations_of_a_step(cache, tmp_path, batch_size=batch, micro_batch=micro).total()
        for batch, micro in ((32, 32), (32, 16), (32, 8), (8, 8))
    )
    assert one == small, "the same for 32 views as for 8"
    assert four - two == 2 * (two - one), "each micro-batch asks for the same"
    assert one < A_STEP
    assert two - one < ONE_MORE


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 8}, {"masks_per_view": 4}, {"checkpointing": True}])
def test_a_step_neither_waits_for_the_device_nor_fetches_from_it(
    changes: dict[str, Any], coded_cache: Path, tmp_path: Path
) -> None:
    seen = operations_of_a_step(coded_cache, tmp_path, **changes)
    assert [name for name in seen if name.split(".")[1] in WAITS] == []
