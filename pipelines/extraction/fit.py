"""The codec of a target set: fitted once, on views drawn by hash over the source, and measured on others."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pkgutil import resolve_name

import torch

from pipelines.extraction.base_batches import targets_of_crops
from pipelines.extraction.prepare_targets import TargetJob
from pipelines.extraction.prepare_views import ViewJob
from pipelines.extraction.sample import Sample, sample_crops
from tec_cache.cache import layout
from tec_cache.cache.listing import units_in
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import CodecRecord
from tec_cache.cache.writer import put_payload
from tec_cache.codec import CODECS, Codec, get_codec
from tec_cache.codec.errors import TargetErrors
from tec_cache.codec.quality import errors_text
from tec_cache.data.image_pool import ImagePool
from tec_cache.distributed import Ranks
from tec_cache.errors import CacheError, ConfigError
from tec_cache.progress import Progress
from tec_cache.store import Store
from tec_cache.types import Targets, TargetSpec

MOST_CHECKED = 128
"""Views on which the errors are measured: a quarter of those of the fit, at most this many."""

GPU_FIT_THREADS = 4
"""Threads of the fit, which runs on the host, for a base on a GPU: with another number the last bits differ, and
torchrun sets it to 1."""

EXACT_CHECKED = 32
"""The same where nothing is fitted: half precision errs alike on every view."""


@dataclass(frozen=True)
class Coded:
    """A codec and the record that committed it."""

    codec: Codec
    record: CodecRecord

    @property
    def sha256(self) -> str:
        """Of the parameters; empty without any."""
        return self.record.payload.sha256 if self.record.payload else ""


PATIENCE = 1800.0
"""Seconds that a rank waits for each rank before it to fit the codec, which takes minutes."""
PAUSE = 1.0
"""Seconds between two looks whether the codec is there."""


def ensure_codec(
    cache: Cache,
    job: TargetJob,
    views: ViewJob,
    pool: ImagePool,
    *,
    on_error: str,
    ranks: Ranks | None = None,
    quiet: bool,
) -> Coded:
    """Return the codec of a target set; fit, measure and commit it where that was not done yet.

    Of the ranks of one job the first fits it, and the others wait for its record. Parts, which may start at any time
    or never, wait for nobody. Several processes may still fit it at once: the first one's counts, and all go on with
    that. Raises ConfigError where there are too few photos to fit a codec.
    """
    cache = Cache(cache.store, cache.manifest)  # a fresh list of units: views may have been made meanwhile
    there = _committed(cache, job)
    if there is None and units_in(cache.store, layout.target_records(job.name)):
        there = _committed(cache, job) or _lost(cache, job)  # asked again: another job may have fitted it meanwhile
    if there is None and ranks is not None and _appears(cache.store, layout.codec_record(job.name), ranks):
        there = _committed(cache, job)
    if there is not None:
        return there
    checked = max(1, min(MOST_CHECKED, job.fit_views // 4)) if job.quality.fitted else EXACT_CHECKED
    wanted = (job.fit_views if job.quality.fitted else 0) + checked
    samples = sample_crops(cache, views, wanted, on_error=on_error)
    if not samples:
        raise ConfigError("there is no photo to measure the targets on", where=cache.store.url, todo="give photos")
    fit, check = _divided(samples, wanted, checked)
    if not fit and job.quality.fitted:
        todo = "use --quality exact, which needs no fit"
        raise ConfigError("a codec needs at least two photos to be fitted and measured", todo=todo)
    with Progress(f"fit {job.name}", total=len(fit) + len(check), quiet=quiet) as progress:
        codec = new_codec(job, _targets(job, fit, pool, progress))
        errors = TargetErrors()
        for exact in _targets(job, check, pool, progress):
            errors.add(exact, recoded(codec, exact, job.spec))
    if not quiet:  # now, not after days of extraction
        text = errors_text(errors.summary(), job.quality.asked, len(check))
        print(f"fit {job.name}: quality {job.quality}{text}", file=sys.stderr, flush=True)
    return commit_codec(cache, job, codec, len(fit), len(check), errors.summary())


def _appears(store: Store, record: str, ranks: Ranks) -> bool:
    """Wait until another rank has committed the codec; False where this one is to fit it.

    Ranks need no meeting for that, and none is lost where those before it have died and nobody ends the job: waiting
    only saves work. torchrun ends all of them at once.
    """
    if ranks.main:
        return False
    begin = time.monotonic()
    while store.size(record) is None:
        if time.monotonic() - begin > ranks.rank * PATIENCE:
            waited = f"{time.monotonic() - begin:,.0f} s"
            print(f"rank {ranks.rank} fits the codec: no other one has in {waited}", file=sys.stderr, flush=True)
            return False
        time.sleep(PAUSE)
    return True


def recoded(codec: Codec, targets: Targets, spec: TargetSpec) -> Targets:
    """Encode and decode targets."""
    stored = {name: torch.from_numpy(values) for name, values in codec.encode(targets, spec).items()}
    return codec.decode({name: values.to(targets.features.device) for name, values in stored.items()}, spec)


def _committed(cache: Cache, job: TargetJob) -> Coded | None:
    """Return the codec that was committed, if one was; a CacheError where the set is another by now."""
    target = Cache(cache.store, cache.manifest)[job.name]
    if target.fingerprint != job.fingerprint:
        raise CacheError(
            f"another job has begun the target set {job.name!r} with other settings meanwhile",
            where=cache.store.place(layout.target_manifest(job.name)),
            todo="run the same command again: it names the fields that differ",
        )
    return Coded(target.codec, target.codec_record) if target.fitted else None


def _lost(cache: Cache, job: TargetJob) -> Coded:
    raise CacheError(
        f"target set {job.name!r} has finished units, but its codec is gone",
        where=cache.store.place(layout.codec_record(job.name)),
        todo="restore it from a copy: what a new fit gives does not decode them; or make the set again: --overwrite",
    )


def _divided(samples: list[Sample], wanted: int, checked: int) -> tuple[list[Sample], list[Sample]]:
    """Divide samples in fit and check, in the asked proportion; no photo is in both."""
    photos = list(dict.fromkeys((s.shard, s.key) for s in samples))
    count = max(1, round(len(photos) * checked / wanted))
    held = set(photos[:count])
    in_check = [(s.shard, s.key) in held for s in samples]
    fit = [s for s, c in zip(samples, in_check, strict=True) if not c]
    check = [s for s, c in zip(samples, in_check, strict=True) if c]
    return fit, check


def _targets(job: TargetJob, samples: list[Sample], pool: ImagePool, progress: Progress) -> Iterator[Targets]:
    for targets in targets_of_crops(job, [s.jpeg for s in samples], [s.key for s in samples], pool):
        yield targets
        progress.advance(len(targets.features))


def new_codec(job: TargetJob, batches: Iterator[Targets]) -> Codec:
    """Collect the targets on the host and fit the codec there; no target is made for one that needs no fit."""
    fit = CODECS[job.quality.codec].fit
    if fit is None:
        return get_codec(job.quality.to_json(0), None)
    features, attention = [], []
    for targets in batches:
        features.append(targets.features.cpu())
        if targets.attention is not None:
            attention.append(targets.attention.cpu())
    collected = Targets(torch.cat(features), torch.cat(attention) if attention else None)
    before = torch.get_num_threads()
    if job.compute.device.type != "cpu":  # there the number is part of the set's identity already
        torch.set_num_threads(GPU_FIT_THREADS)
    try:
        kl = job.quality.kl if job.spec.num_rows else None
        codec: Codec = resolve_name(fit)(collected, job.spec, mse=job.quality.mse, kl=kl)
        return codec
    finally:
        torch.set_num_threads(before)


def commit_codec(
    cache: Cache, job: TargetJob, codec: Codec, fitted: int, checked: int, errors: dict[str, float]
) -> Coded:
    """Write the codec of a target set, unless another job was first; return the one that counts."""
    store, parameters, payload = cache.store, codec.to_bytes(), None
    if parameters is not None:
        with store.draft() as draft:
            draft.write_bytes(parameters)
            payload = put_payload(store, draft, lambda sha256: layout.codec_payload(job.name, sha256))
        assert hashlib.sha256(parameters).hexdigest() == payload.sha256
    record = CodecRecord(
        identity=job.fingerprint, payload=payload, fitted_views=fitted, checked_views=checked, errors=errors
    )
    there = record.create(store, layout.codec_record(job.name))
    if payload is not None and there.payload != payload:
        store.remove(payload.name)  # another job was first
    coded = _committed(cache, job)
    assert coded is not None
    return coded
