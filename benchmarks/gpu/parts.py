"""The parts, in the order in which they are worth having, each with the minutes that it may need and its question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.data import Data
from benchmarks.gpu.feeding import kernels, loading, stage_one
from benchmarks.gpu.ranks import two_ranks
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.training import checkpoints, fidelity, memory, steps


@dataclass(frozen=True)
class Part:
    """Something that is measured by itself.

    minutes: estimated, for one H100 and 16 cores; it is not begun where less time is left.
    """

    name: str
    minutes: float
    question: str
    work: Callable[[Data], list[dict[str, Any]]]


def parts_of(size: Size) -> list[Part]:
    """List the parts of a size: about 40 minutes in all for the models of `sizes.GPU`."""
    weight = {"small": 0.7, "base": 1.0, "large": 2.0}
    first = [
        Part("data", 3, "Photos, bases and caches for all others.", prepare_data),
        Part("fidelity", 3, "Do bfloat16 and --compile give the losses and gradients of float32?", fidelity),
        Part("kernels", 1, "What do decoding and encoding targets cost on the device?", kernels),
    ]
    uncompiled = [
        Part(
            f"steps-{model}",
            3 * weight[model],
            f"ViT-{model}: how near is a cached step to the student alone, and how far from the base in the loop?",
            partial(steps, model=model, compiled=False),
        )
        for model in size.models
    ]
    compiled = [
        Part(
            f"steps-{model}-compiled",
            3.5 * weight[model],
            f"ViT-{model}: the same with --compile.",
            partial(steps, model=model, compiled=True),
        )
        for model in size.models
    ]
    memories = [
        Part(
            f"memory-{model}",
            1.5 * weight[model],
            f"ViT-{model}: the allocator's peak by micro-batch; does the default fit?",
            partial(memory, model=model),
        )
        for model in size.models
    ]
    stages = [
        Part("stage-one-base", 2, "Does the base bind stage one?", partial(stage_one, costly=True)),
        Part("stage-one-photos", 2, "How fast is stage one when photos bind?", partial(stage_one, costly=False)),
    ]
    rest = [
        Part("loader", 1.5, "Views a second on the device, by workers.", loading),
        Part("two-ranks", 1.5, "Do two ranks on one card give one's gradients?", two_ranks),
        Part("checkpoints", 1.5, "What does a checkpoint cost a training?", partial(checkpoints, model=size.main)),
    ]
    return [*first, *uncompiled, *memories, *stages, *rest, *compiled]


def prepare_data(data: Data) -> list[dict[str, Any]]:
    """Make all that more than one part needs."""
    for model in data.size.models:
        data.cache(model)
    return [{"photos": data.size.photos, "caches": len(data.size.models)}]
