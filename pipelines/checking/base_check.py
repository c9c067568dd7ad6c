"""Is what is stored still what the base says? The base runs again on a sample of the stored crops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipelines.extraction.base_batches import targets_of_crops
from pipelines.extraction.prepare_targets import TargetJob
from pipelines.loading.base_of_set import base_again, given_before, same_base
from tec_cache.audit.findings import DROP, Finding, unreadable
from tec_cache.base.load import load_base
from tec_cache.base.source import Given
from tec_cache.cache import layout
from tec_cache.cache.identity import differences
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.record import CodecRecord, TargetRecord
from tec_cache.cache.target_set import TargetSet
from tec_cache.codec.agreement import attention_agreement, cosine_of_views
from tec_cache.codec.errors import TargetErrors
from tec_cache.codec.quality import Quality
from tec_cache.data.image_pool import ImagePool
from tec_cache.device import Compute, default_threads, resolve_compute
from tec_cache.errors import CacheError
from tec_cache.paths import exact_name
from tec_cache.progress import Progress
from tec_cache.rng import key64, permutation
from tec_cache.types import Targets

if TYPE_CHECKING:
    from pipelines.verify import How

NOISE = {"float32": 2e-5, "bfloat16": 2e-3}
"""Relative MSE, and KL in nats, between two runs of one base on different devices or in different precisions.
Measured with a pretrained ViT-S/14 on 16 photos: TF32 against float32 2.1e-6 and 1.4e-6, bfloat16 against float32
1.4e-4 and 1.8e-4. About ten times that, for deeper bases."""

SIGMAS = 4.0
"""Deviations of a sample's mean that pass. Views of one photo, or of one class, are alike: a sample is worth fewer
independent views than it counts, so this is generous."""

LEAST_DEVIATION = 0.25
"""Of a mean error: the deviation among views is taken as at least this share, for it may have been measured on few."""

OUTLIER = {"mse": 2.0, "kl": 4.0, "class": 4.0}
"""A view errs too much beyond 8 deviations and this many times the worst view of the codec's own measurement.
Another view's features are at 1.2 to 2.6 (measured as above, any normalization), far from any codec's error; the
divergence of attention rows has longer tails."""

LEAST_ALIKE = 0.8
"""Least share of attention rows that stored and new targets both choose, on average. Measured as above: 0.996."""

LEAST_ALIKE_VIEW = 0.5
"""The same for one view (measured: 0.93), where at least 3 rows are chosen."""


@dataclass
class BaseCheck:
    """What running the base again on a sample of a target set's crops gave."""

    target: str
    base: str
    views: int = 0
    units: int = 0
    measured: dict[str, float] = field(default_factory=dict)
    """mse, kl, cosine, rows_alike, class: means over the sample, without views that are outliers."""
    stated: dict[str, float] = field(default_factory=dict)
    """mse, kl, class as the codec's record has them."""
    allowed: dict[str, float] = field(default_factory=dict)
    """Largest mse, kl and class that pass."""
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the figures; the findings are listed elsewhere."""
        values = dataclasses.asdict(self)
        del values["findings"]
        return values


class _Row(NamedTuple):
    """A sampled view."""

    unit: Unit
    record: TargetRecord
    row: int
    key: str
    jpeg: bytes
    codes: dict[str, Any]


def check_base(
    target: TargetSet,
    units: Sequence[Unit],
    how: How,
    *,
    pool: ImagePool,
    quiet: bool = True,
) -> BaseCheck:
    """Compare what the base says of a sample of the stored crops with the stored targets.

    units: those that may be sampled. Raises ConfigError or WeightsError where the base cannot be loaded, and
    NonFiniteError.
    """
    check = BaseCheck(target.name, how.base or str(target.manifest["notes"]["base"]))
    job = _job(target, how)
    changed = differences(target.identity["base"], job.base.identity)
    if changed:
        todo = "give the weights that made this target set, with --base-weights, or make the set again"
        what = "the base is not the one that made these targets: " + "; ".join(changed)
        check.findings.append(Finding("base", layout.target_manifest(target.name), "", what, todo))
    if job.spec != target.spec or job.base.input_size != target.identity["input_size"]:
        return check  # nothing can be compared
    with Progress(f"base {target.name}", total=how.sample, quiet=quiet) as progress:
        rows, found = compare(target, job, _sampled(target, units, how.sample, how.seed, check), pool, progress)
    if rows:
        precision = {job.compute.precision, str(target.identity["precision"])}
        judge(target, rows, found, NOISE["bfloat16" if "bfloat16" in precision else "float32"], check)
    return check


def _job(target: TargetSet, how: How) -> TargetJob:
    """Load the base, to be run as it was, but in float32 on a CPU."""
    identity, spec = target.identity, target.spec
    compute = resolve_compute(how.device, "auto")
    precision = "float32" if compute.device.type == "cpu" else str(identity["precision"])
    if compute.device.type == "cpu":
        torch.set_num_threads(min(default_threads(1), int(identity["threads"] or default_threads(1))))
    shape: dict[str, Any] = {"grid": target.cache.grid, "last_layers": int(identity["last_layers"]), "k": spec.k}
    shape["class_target"] = spec.class_token
    notes = target.manifest["notes"]
    shape["given"] = Given.of(how.mean, how.std, how.base_args).over(given_before(notes))
    own = how.base is None or same_base(how.base, exact_name(str(notes["base"])))
    name, weights = base_again(notes, how.weights, target=target.name) if own else (str(how.base), how.weights)
    base = load_base(name, weights, **shape)
    compute = Compute(compute.device, precision)
    return TargetJob(
        name=target.name,
        base=base.prepare(compute),
        spec=base.spec(spec.normalization),
        quality=Quality.from_json(identity["codec"]),
        fit_views=0,
        batch_size=int(identity["batch_size"]),
        compute=compute,
        fingerprint=target.fingerprint,
    )


def _sampled(target: TargetSet, units: Sequence[Unit], sample: int, seed: int, check: BaseCheck) -> Iterator[_Row]:
    """Draw rows by hash from as many units as possible, two from each at least; damaged units become findings."""
    order = sorted(units, key=lambda unit: key64("verify", seed, str(unit)))[: max(1, sample // 2)]
    whole, rest = divmod(sample, max(1, len(order)))
    for place, unit in enumerate(order):
        views = target.cache.views_record(unit)
        record = target.record(unit, views)
        chosen = permutation(key64("verify rows", seed, str(unit)), record.count)[: whole + (place < rest)]
        rows = sorted(chosen.tolist())
        try:
            crops = target.cache.read_crops(views, rows)
            blocks = {number: target.read_block(record, number) for number in {row // BLOCK_ROWS for row in rows}}
        except CacheError as error:
            check.findings.append(_damaged(target, unit, views.payload, record, error))
            continue
        for row, jpeg in zip(rows, crops, strict=True):
            codes = {array: values[row % BLOCK_ROWS].copy() for array, values in blocks[row // BLOCK_ROWS].items()}
            yield _Row(unit, record, row, views.keys[row], jpeg, codes)


def _damaged(target: TargetSet, unit: Unit, tar: Any, record: TargetRecord, error: CacheError) -> Finding:
    """Name the payload that could not be read, or is damaged."""
    assert record.payload is not None
    name, commit = record.payload.name, layout.target_record(target.name, unit)
    if tar is not None and tar.name in error.where:
        name, commit = tar.name, layout.views_record(unit)
    cause = error.__cause__
    if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
        return unreadable(name, unit, cause, commit)
    return Finding("payload", name, str(unit), error.what, DROP, (commit, name))


def compare(
    target: TargetSet, job: TargetJob, sample: Iterator[_Row], pool: ImagePool, progress: Progress
) -> tuple[list[_Row], dict[str, npt.NDArray[np.float64]]]:
    """Run the base on sampled views; return them, without their bytes, and how far the stored targets are off.

    The figures are mse, cosine and, with such targets, kl and rows_alike, and class, of each view: (N,).
    """
    # which rows of attention were chosen may differ, so the rest alone goes through the codec's own measure
    errors = TargetErrors()
    rows: list[_Row] = []
    figures: dict[str, list[torch.Tensor]] = {}
    while part := list(islice(sample, job.batch_size)):
        (new,) = targets_of_crops(job, [row.jpeg for row in part], [row.key for row in part], pool)
        stored = _decoded(target, part, job.compute.device)
        errors.add(replace(new, attention=None), replace(stored, attention=None))
        figures.setdefault("cosine", []).append(cosine_of_views(new, stored))
        if new.attention is not None:
            for name, values in zip(("kl", "rows_alike"), attention_agreement(new, stored), strict=True):
                figures.setdefault(name, []).append(values)
        rows += [row._replace(jpeg=b"", codes={}) for row in part]
        progress.advance(len(part))
    found = {name: torch.cat(values).numpy() for name, values in figures.items()}
    if rows:
        found["mse"] = errors.mse_of_views.numpy()
        if job.spec.class_token:
            found["class"] = errors.class_of_views.numpy()
    return rows, found


def _decoded(target: TargetSet, rows: list[_Row], device: torch.device) -> Targets:
    """Decode the stored codes of some views."""
    codes = {}
    for array in rows[0].codes:
        values = np.stack([row.codes[array] for row in rows])
        values = values.astype(np.int32) if values.dtype == np.uint16 else values  # as the loader does
        codes[array] = torch.from_numpy(values).to(device)
    return target.decode(codes)


def judge(
    target: TargetSet, rows: list[_Row], found: dict[str, npt.NDArray[np.float64]], noise: float, check: BaseCheck
) -> None:
    """Tell a base that changed from single units whose rows are not those of their crops.

    found: mse, cosine, kl, rows_alike, class of each view (N,).
    """
    codec = target.codec_record
    names = [name for name in ("mse", "kl", "class") if name in found]
    k = target.spec.k
    outliers = np.zeros(len(rows), bool)
    for name in names:
        outliers |= ~(found[name] <= view_limit(codec, name, noise))  # NaN is an outlier too
    if isinstance(k, int) and k >= 3:
        outliers |= found["rows_alike"] < LEAST_ALIKE_VIEW
    rest = found if outliers.mean() > 0.5 else {name: values[~outliers] for name, values in found.items()}
    check.views, check.units = len(rows), len({row.unit for row in rows})
    check.measured = {name: float(f"{values.mean():.6g}") for name, values in rest.items()}
    check.stated = {name: codec.errors[name] for name in names}
    check.allowed = {name: mean_limit(codec, name, len(rest[name]), noise) for name in names}
    wrong = [
        f"{name} {check.measured[name]:.3g}, stated {check.stated[name]:.3g}, allowed {check.allowed[name]:.3g}"
        for name in names
        if not check.measured[name] <= check.allowed[name]
    ]
    if check.measured.get("rows_alike", 1.0) < LEAST_ALIKE:
        wrong.append(f"only {check.measured['rows_alike']:.0%} of the attention rows are those that the base chooses")
    if wrong:
        todo = "give the weights that made this set (--base-weights); if they are the same, make the set again"
        what = "the stored targets are not what the base says of the stored crops: " + "; ".join(wrong)
        check.findings.append(Finding("base", layout.target_manifest(target.name), "", what, todo))
    elif not any(finding.kind == "base" for finding in check.findings):
        check.findings += _of_units(target, rows, found, outliers)


def _of_units(
    target: TargetSet, rows: list[_Row], found: dict[str, npt.NDArray[np.float64]], outliers: npt.NDArray[np.bool_]
) -> Iterator[Finding]:
    """Name the units in which a view's targets are not those of its crop."""
    for unit, group in groupby((i for i in range(len(rows)) if outliers[i]), key=lambda i: rows[i].unit):
        first, *more = list(group)
        row, payload = rows[first], rows[first].record.payload
        assert payload is not None
        figures = ", ".join(f"{name} {values[first]:.3g}" for name, values in found.items())
        also = f", and {len(more)} more" if more else ""
        what = f"row {row.row} ({row.key!r}{also}) holds the targets of something else: {figures}"
        yield Finding(
            "targets", payload.name, str(unit), what, DROP, (layout.target_record(target.name, unit), payload.name)
        )


def _deviation(codec: CodecRecord, name: str) -> float:
    return max(codec.errors[f"{name}_std"], LEAST_DEVIATION * codec.errors[name])


def mean_limit(codec: CodecRecord, name: str, views: int, noise: float) -> float:
    """Return the largest mean error of a sample of views that fits the stated one."""
    sampling = math.sqrt(1 / max(1, codec.checked_views) + 1 / max(1, views))
    return codec.errors[name] + SIGMAS * _deviation(codec, name) * sampling + noise


def view_limit(codec: CodecRecord, name: str, noise: float) -> float:
    """Return the largest error of a single view that fits the stated ones."""
    worst = codec.errors[f"{name}_max"]
    return max(codec.errors[name] + 8 * _deviation(codec, name), OUTLIER[name] * worst) + noise
