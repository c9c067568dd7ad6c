"""A student judged while it trains: what `tec-cache probe` would say of its export at this step."""

from __future__ import annotations

import copy

import torch

from pipelines.judging.frozen_features import Inputs, Scores, Tally, scores_of
from tec_cache.base.model import FrozenBase
from tec_cache.config import ProbeConfig, TrainConfig
from tec_cache.device import Compute
from tec_cache.distributed import Ranks, agreed, patient_group
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.run.export import export_state
from tec_cache.student.model import Student


def probe_config(config: TrainConfig) -> ProbeConfig | None:
    """Return the settings of `tec-cache probe` for a training's exports; None where it is not judged."""
    if not config.probe_every:
        return None
    return ProbeConfig(
        model=config.out,
        train=config.probe_train or "",
        test=config.probe_test or "",
        neighbours=config.probe_neighbours,
        limit=config.probe_limit,
        device=config.device,
        precision=config.precision,
        workers=config.workers,
        on_error=config.on_error,
    )


class StudentJudge:
    """Both probes of the encoder as it would be exported, on photos that were all looked at beforehand.

    Photos are decoded anew at each judgement: memory holds one batch of them, their features (4 bytes a channel, on
    the device) and, for its duration, a copy of the encoder. Rank 0 does the work, the others wait.
    """

    def __init__(self, config: ProbeConfig, size: int, compute: Compute, ranks: Ranks, *, quiet: bool) -> None:
        """Decode every image once, for an encoder of `size` pixels. Raises SourceError, and ConfigError for labels."""
        self.config, self.compute, self.ranks = config, compute, ranks
        self._group = patient_group(ranks)
        self._inputs = Inputs.opened(config) if ranks.main else None
        found = self._inputs.checked(size, config, quiet) if self._inputs is not None else None
        self.tally = agreed(found, ranks, self._group) or Tally()
        self.converged = True
        """Whether the last linear classifier was the best there is; known to rank 0 alone."""

    def __call__(self, student: Student) -> dict[str, float]:
        """Return both accuracies, 0 to 1; the student stays as it is."""
        scores = None
        if self._inputs is not None:
            found = self._scores(student, self._inputs)
            self.converged = found.linear.converged
            scores = {"probe_knn": found.knn, "probe_linear": found.linear.accuracy}
        return agreed(scores, self.ranks, self._group) or {}

    def _scores(self, student: Student, inputs: Inputs) -> Scores:
        # the loop's autocast off: as in a probe, only the model runs under one
        with torch.no_grad(), torch.autocast(self.compute.device.type, enabled=False):
            model = exported_encoder(student)
            return scores_of(*inputs.features(model, self.config, self.compute, quiet=True), self.config)

    def remarks(self) -> list[str]:
        """Say what was assumed of the classes, and what of the photos was left out or not understood; on rank 0."""
        said = [self._inputs.remark] if self._inputs is not None and self._inputs.remark else []
        said += [f"left out: {number:,} {kind}" for kind, number in self.tally.left_out.items()]
        said += [f"used, though not understood: {number:,} {kind}" for kind, number in self.tally.noted.items()]
        return said + ([] if self.converged else ["the linear classifier has not converged"])


def exported_encoder(student: Student) -> FrozenBase:
    """Return a copy of the encoder as `tec-cache export` would write it now, on the student's device."""
    encoder = copy.deepcopy(student.encoder)
    encoder.load_state_dict(export_state(student), strict=True)
    return FrozenBase(encoder, name="student", identity={}, mean=IMAGENET_MEAN, std=IMAGENET_STD, last_layers=1, k=None)
