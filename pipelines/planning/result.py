"""The arithmetic of a plan: amounts times what one of each costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipelines.extraction.label_counts import LabelCounts
from pipelines.planning.amount import Amount
from pipelines.planning.extract import TargetCosts, ViewCosts
from pipelines.planning.training import TrainingCosts

HOUR = 3600.0
MARGIN = 1.05
"""A plan's bytes may be wrong by 5 %: what fits more tightly does not fit."""
CORES = ("reading photos", "decoding and cropping", "writing crops", "writing targets")
"""Stages that take the cores, whatever device the base is on. Targets are compressed as they are written."""
FLOP = 2
"""Of one multiply-accumulate."""


@dataclass(frozen=True)
class Plan:
    """What an extraction, and the trainings after it, will take."""

    cache: str
    target: str | None
    quality: str
    amount: Amount
    views: ViewCosts
    targets: TargetCosts | None
    fitted: tuple[int, int]
    """Views from which the codec will be fitted, and on which it will be checked."""
    training: TrainingCosts | None
    free: int | None
    """Free bytes of the disk, None where nobody can say."""
    epochs: int
    batch_size: int
    start: float
    """Seconds to load the base and look at the cache."""
    measured_seconds: float
    facts: list[list[str]] = field(default_factory=list)
    """What the base assumes that no shape shows: [name, value, who says so]."""
    asked_errors: dict[str, float] = field(default_factory=dict)
    """Of the stored targets, as the quality asks for them: mse, kl; none where they are exact."""
    labels: LabelCounts = field(default_factory=LabelCounts)
    """The classes, where they are known before all photos are read."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Kind -> how many things in the source are no photos."""
    remarks: list[str] = field(default_factory=list)
    """What was assumed of the source."""
    sampled_share: float = 0.0
    """Share of the source's shards from which the views of the fit are drawn: they are read once more."""

    @property
    def bytes_crops(self) -> float:
        """Of the crops that are left to write, their records included."""
        return self.amount.crops_left * (self.views.written.num_bytes + self.views.written.record_bytes)

    @property
    def bytes_per_target(self) -> float:
        """Of the targets of one view, those that the codec is fitted on and the others taken together."""
        if self.targets is None:
            return 0.0
        rows = self.amount.photos * self.amount.num_views
        share = max(0.0, 1 - self.fitted[0] / max(1, rows))
        return self.targets.written.num_bytes * (1 + share * self.targets.unseen)

    @property
    def bytes_targets(self) -> float:
        """Of the targets that are left to write, their records included."""
        records = self.targets.written.record_bytes if self.targets else 0.0
        once = self.targets.codec_bytes if self.targets else 0
        return once + self.amount.targets_left * (self.bytes_per_target + records)

    @property
    def bytes_needed(self) -> float:
        """Of everything that is left to write."""
        return self.bytes_crops + self.bytes_targets

    @property
    def fits(self) -> bool | None:
        """Whether that fits on the disk, with the plan's own error to spare; None where nobody can say."""
        return None if self.free is None else self.bytes_needed * MARGIN <= self.free

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage of the extraction by itself, with all cores where it can use them.

        `extract` runs all but the start and the fit at the same time: see `total_seconds`. The base's are those with
        the decoding of stored crops beneath it.
        """
        views, left = self.views, self.amount
        found = {
            "start": self.start,
            "reading photos": left.photos_to_cut * views.read,
            "decoding and cropping": left.photos_to_cut * views.cut,
            "writing crops": left.crops_left * views.written.seconds,
        }
        costs = self.targets
        if costs is not None:
            fit, check = self.fitted
            sampled = (fit + check) * costs.base + fit * costs.fit + check * costs.check
            if left.crops_left and fit + check:  # the sample is drawn from photos of which there are no views yet
                sampled += self.sampled_share * left.photos_to_cut * views.read + (fit + check) * views.cut
            found |= {
                "fitting the codec": sampled,
                "base": left.targets_left * costs.base,
                "encoding": left.targets_left * costs.encode,
                "writing targets": left.targets_left * costs.written.seconds,
            }
        return found

    @property
    def total_seconds(self) -> float:
        """Seconds of the whole extraction.

        On a CPU all stages share the cores, so that overlapping them saves nothing but the waiting for disks: their
        sum. A base on a device of its own works beside the cores: the slower of both, behind the start and the fit.
        """
        seconds = self.seconds
        if self.targets is None or not self.targets.own_device:
            return sum(seconds.values())
        first = seconds["start"] + seconds["fitting the codec"]
        device = seconds["base"] + seconds["encoding"]
        cores = sum(seconds[name] for name in CORES) + self.amount.targets_left * self.targets.decode
        return first + max(device, cores)

    @property
    def rates(self) -> dict[str, str]:
        """How fast the stages are, for people."""
        views, costs = self.views, self.targets
        per_item = {
            "reading photos": (views.read, "photos"),
            "decoding and cropping": (views.cut, "photos"),
            "writing crops": (views.written.seconds, "crops"),
        }
        if costs is not None:
            per_item |= {
                "base": (costs.base, "views"),
                "encoding": (costs.encode, "views"),
                "writing targets": (costs.written.seconds, "views"),
            }
        return {name: f"{1 / seconds:,.1f} {noun}/s" for name, (seconds, noun) in per_item.items() if seconds}

    @property
    def bottleneck(self) -> str:
        """The stage that takes longest, and for which the others wait."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def epoch_seconds(self) -> dict[str, float]:
        """Seconds of one epoch, cached and online."""
        if self.training is None:
            return {}
        return {name: self.amount.photos * one for name, one in self.training.per_view(self.batch_size).items()}

    @property
    def break_even_epochs(self) -> float | None:
        """Epochs after which extracting and training cached has taken less time than training online; None: never."""
        epoch = self.epoch_seconds
        if not epoch or epoch["online"] <= epoch["cached"]:
            return None
        return self.total_seconds / (epoch["online"] - epoch["cached"])

    @property
    def flop(self) -> dict[str, float]:
        """FLOP of the extraction and of one training, cached and online."""
        if self.training is None:
            return {}
        trained = self.amount.photos * self.epochs
        base, step = FLOP * self.training.base_macs, FLOP * self.training.step_macs
        return {
            "extraction": float(base * (self.amount.targets_left + sum(self.fitted))),
            "cached_run": float(step * trained),
            "online_run": float((step + base) * trained),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        found: dict[str, Any] = {
            "cache": self.cache,
            "target": self.target,
            "quality": self.quality,
            "facts": self.facts,
            "photos": self.amount.photos,
            "photos_estimated": self.amount.estimated,
            "num_views": self.amount.num_views,
            "left": {
                "photos": self.amount.photos_to_cut,
                "crops": self.amount.crops_left,
                "targets": self.amount.targets_left,
            },
            "bytes": self._bytes(),
            "extract": {
                "hours": {name: seconds / HOUR for name, seconds in self.seconds.items()},
                "hours_total": self.total_seconds / HOUR,
                "bottleneck": self.bottleneck,
            },
            "broken": list(self.views.broken),
            "measured": {
                "seconds": self.measured_seconds,
                "photos": self.views.sampled,
                "targets": self.targets.views if self.targets else 0,
            },
        }
        if self.training is not None:
            found |= self._training_json(self.training)
        return found

    def _bytes(self) -> dict[str, Any]:
        return {
            "per_crop": self.views.written.num_bytes,
            "per_target": self.bytes_per_target if self.targets else None,
            "crops": self.bytes_crops,
            "targets": self.bytes_targets,
            "needed": self.bytes_needed,
            "there": self.amount.bytes_there,
            "free": self.free,
            "fits": self.fits,
        }

    def _training_json(self, training: TrainingCosts) -> dict[str, Any]:
        epochs = self.break_even_epochs
        hours = {name: seconds / HOUR for name, seconds in self.epoch_seconds.items()}
        bottleneck = training.bottleneck(self.batch_size)
        return {
            "train": {
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "measured_micro_batch": training.micro_batch,
                "hours_per_epoch": hours,
                "hours_per_run": {name: value * self.epochs for name, value in hours.items()},
                "bottleneck": bottleneck,
            },
            "macs": {"base_per_view": training.base_macs, "student_per_view_and_step": training.step_macs},
            "flop": self.flop,
            "break_even": {
                "epochs": epochs,
                "runs": None if epochs is None else epochs / self.epochs,
            },
        }
