"""Judge a frozen model: features of labelled images, then nearest neighbours and a linear classifier."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.judging.frozen_features import Inputs, scores_of
from pipelines.loading.base_given import given_by, load_judged
from tec_cache.base.model import FrozenBase
from tec_cache.config import ProbeConfig
from tec_cache.device import resolve_compute
from tec_cache.memory import explained_memory
from tec_cache.printable import counted


@dataclass
class ProbeSummary:
    """What the probes found; accuracies from 0 to 1."""

    model: str
    knn: float
    linear: float
    linear_converged: bool
    train_images: int
    test_images: int
    skipped: int
    """Photos left out of both parts, those that a cache had left out before included."""
    left_out: dict[str, int]
    """Why, and how many of them."""
    noted: dict[str, int]
    """What was not understood of photos that were used, and of how many."""
    classes: int
    class_names: list[str] | None
    """In the order of their numbers; None where labels are numbers only."""
    remark: str
    """What was assumed of the classes; empty where nothing was."""
    features: int
    images_per_second: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def probe(config: ProbeConfig, *, quiet: bool = True) -> ProbeSummary:
    """Extract frozen features of both parts and score both probes. Raises ConfigError, SourceError, WeightsError."""
    begin = time.monotonic()
    inputs = Inputs.opened(config)
    compute = resolve_compute(config.device, config.precision)
    model = load_model(config).prepare(compute)
    count = config.batch_size
    todo = f"give --batch-size {count // 2}" if count > 1 else "use a GPU with more memory, or --device cpu"
    with explained_memory(lambda: f"the model on {counted(count, 'image')} at once", str(compute.device), lambda: todo):
        train, test = inputs.features(model, config, compute, quiet)
    seconds = time.monotonic() - begin
    scores, names = scores_of(train, test, config), inputs.classes
    left_out = train.tally.left_out + test.tally.left_out
    return ProbeSummary(
        model=config.model,
        knn=scores.knn,
        linear=scores.linear.accuracy,
        linear_converged=scores.linear.converged,
        train_images=len(train.values),
        test_images=len(test.values),
        skipped=left_out.total(),
        left_out=dict(left_out),
        noted=dict(train.tally.noted + test.tally.noted),
        classes=len(names) if names else int(train.labels.max()) + 1,
        class_names=list(names) if names else None,
        remark=inputs.remark,
        features=train.values.shape[1],
        images_per_second=(len(train.values) + len(test.values)) / seconds,
        seconds=time.monotonic() - begin,
    )


def load_model(config: ProbeConfig) -> FrozenBase:
    """Load what is to be judged: `random:NAME`, or anything that `--base` takes."""
    return load_judged(config.model, config.weights, grid=config.grid, given=given_by(config))
