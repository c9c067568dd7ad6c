"""How long the measuring itself will take: what was asked for, or more where the base is slow on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipelines.extraction.base_batches import targets_of
from pipelines.extraction.prepare_targets import TargetJob
from pipelines.planning.extract import FEWEST_FITTED, PROBED, timed
from pipelines.planning.training import Prepared
from tec_cache.cache.layout import BLOCK_ROWS
from tec_cache.flops import BACKWARD, base_macs, student_macs
from tec_cache.printable import counted
from tec_cache.progress import human_seconds
from tec_cache.student.masking import num_visible_patches

CODED = 1.3
"""Times as long as the base takes the targets of a view with fitting, coding and writing them."""
FEWEST_TRAINED = 9
"""Views that go through the student, at least: two to warm up, four to choose a micro-batch, three steps of one."""
WORTH_SAYING = 1.2
"""Times the given seconds from which on the reason is said."""


@dataclass(frozen=True)
class Duration:
    """About how long a plan measures."""

    seconds: float
    reason: str = ""
    """Why it takes longer than was asked for; empty where it does not."""

    def __str__(self) -> str:
        """Return what is said before the measuring begins."""
        return f"measuring takes about {human_seconds(self.seconds)}" + (f": {self.reason}" if self.reason else "")


def expected(seconds_of: dict[str, float], job: TargetJob, prepared: Prepared, *, fitted: bool) -> Duration:
    """Try the base on a few empty views, and say how long the stages will be measured.

    seconds_of: what each stage was given. fitted: whether the codec is there already. Targets and training have a
    number of views below which their figures mean nothing; on a slow machine these take longer than was given.
    """
    size = job.base.input_size
    pixels = torch.zeros(PROBED, size, size, 3, dtype=torch.uint8)
    targets_of(job, pixels[:1])
    per_view = timed(lambda: targets_of(job, pixels))[1] / PROBED
    fewest = BLOCK_ROWS if fitted or not job.quality.fitted else FEWEST_FITTED
    visible = num_visible_patches(job.spec.num_tokens, prepared.config.mask_ratio)
    step = per_view * (1 + BACKWARD) * student_macs(prepared.student, visible) / base_macs(job.base)
    least = {"targets": fewest * per_view * CODED, "training": FEWEST_TRAINED * (step + per_view / 2)}
    seconds = sum(max(given, least.get(stage, 0.0)) for stage, given in seconds_of.items())
    if seconds < WORTH_SAYING * sum(seconds_of.values()):
        return Duration(seconds)
    return Duration(seconds, f"the base takes {per_view:.2g} s per view here, and needs {counted(fewest, 'view')}")
