"""Training in bfloat16 against float32: the same weights, batch, masks and targets, through the trainer's own step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from benchmarks.agreement import Step, agreement, taken
from pipelines.train import prepare_student
from tec_cache.cache.opening import open_cache
from tec_cache.device import Compute
from tec_cache.distributed import Ranks
from tec_cache.finetune.classifier import LoadedEncoder
from tec_cache.finetune.mixing import soft_target_loss
from tec_cache.finetune.model import create_classifier
from tec_cache.run.loop import Loop
from tec_cache.segment.model import create_segmenter
from tec_cache.tasks.pretrain import Pretrain
from tec_cache.tasks.segment import pixel_loss
from tests.conftest import TINY, tiny_training

LOSS = 0.01
COSINE = 0.999
LEAST = 0.95
"""Of one parameter alone: where one is cut off, or computed from the wrong thing, its gradient points elsewhere."""


def pretraining_steps(cache: Path, run: Path, **changes: Any) -> list[Step]:
    """One step of a trainer in float32, and one of a trainer in bfloat16."""
    steps = []
    for precision in ("float32", "bfloat16"):
        config, opened = tiny_training(cache, run, **changes), open_cache(cache)
        compute = Compute(torch.device("cpu"), precision)
        task = Pretrain(config, opened, *prepare_student(config, opened, compute), compute, Ranks())
        loop = Loop(task, config, compute, Ranks())
        batches = task.batches(0, 1)
        steps.append(taken(task.module, loop.losses(next(batches))))
        batches.close()
    return steps


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quality", ["made_cache", "coded_cache"])
def test_pretraining_in_bfloat16_follows_float32(
    quality: str, checkpointing: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    exact, half = pretraining_steps(request.getfixturevalue(quality), tmp_path, checkpointing=checkpointing)
    assert set(exact.losses) == {"loss", "feature", "attention"}, "both branches"
    assert_alike(exact, half)


@pytest.fixture(scope="module")
def encoder() -> LoadedEncoder:
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY, img_size=32)
    return LoadedEncoder(model.eval(), "vit_tiny_patch16_224", dict(TINY), (0.5,) * 3, (0.5,) * 3, made_of={})


def both_precisions(model: nn.Module, losses: Any) -> list[Step]:
    steps = []
    for precision in ("float32", "bfloat16"):
        with Compute(torch.device("cpu"), precision).autocast():
            loss = losses(model)
        steps.append(taken(model, {"loss": loss}))
    return steps


def test_fine_tuning_in_bfloat16_follows_float32(encoder: LoadedEncoder) -> None:
    model = create_classifier(encoder, 5)
    nn.init.normal_(model.vit.head.weight, std=0.3)  # as it begins, the loss is that of no knowledge in any precision
    images, targets = torch.randn(16, 3, 32, 32), torch.eye(5)[torch.arange(16) % 5]
    assert_alike(*both_precisions(model, lambda m: soft_target_loss(m(images), targets)))


def test_segmenting_in_bfloat16_follows_float32(encoder: LoadedEncoder) -> None:
    model = create_segmenter(encoder, 5)
    nn.init.normal_(model.head.weight, std=0.1)
    images, classes = torch.randn(8, 3, 32, 32), torch.randint(0, 5, (8, 32, 32))

    def loss(m: nn.Module) -> torch.Tensor:
        return pixel_loss(m(images), classes)

    assert_alike(*both_precisions(model, loss))


def assert_alike(exact: Step, half: Step) -> None:
    assert exact.losses != half.losses, "bfloat16 rounds"
    found = agreement(exact, half)
    assert max(found.losses.values()) < LOSS, found
    assert found.cosine > COSINE, found
    assert found.lowest[1] > LEAST, found


def test_a_gradient_that_points_elsewhere_is_noticed() -> None:
    exact = Step({"loss": 2.0}, {"a": torch.ones(1000).double(), "b": torch.tensor([0.5, 0.5]).double()})
    turned = Step({"loss": 2.1}, exact.gradients | {"b": torch.tensor([0.5, -0.5]).double()})
    found = agreement(exact, turned)
    assert found.losses == {"loss": pytest.approx(0.05)}
    assert found.cosine > COSINE, "the whole hides one parameter"
    assert found.lowest == ("b", 0.0)
    with pytest.raises(ValueError, match="'b'"):
        agreement(exact, Step({"loss": 2.0}, {"a": torch.ones(1000).double()}))
