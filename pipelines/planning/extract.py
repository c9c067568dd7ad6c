"""A short extraction: every stage as `extract` runs it, on a sample, in a scratch folder beside the cache."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from shutil import rmtree
from typing import Any, TypeVar

import torch

from pipelines.extraction.base_batches import Batch, Places, batches_ahead, targets_of, targets_of_crops, unit_batches
from pipelines.extraction.extract_summary import row_bytes
from pipelines.extraction.fit import EXACT_CHECKED, MOST_CHECKED, commit_codec, new_codec, recoded
from pipelines.extraction.prepare_targets import TargetJob
from pipelines.planning.source import Cut
from tec_cache.background import Stages
from tec_cache.cache import layout
from tec_cache.cache.blocks import write_zip
from tec_cache.cache.identity import fingerprint
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.manifest import ensure_manifest, manifest_body
from tec_cache.cache.pixels import RESIZER, decode_crop, resize
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import SourceRecord, ViewsRecord, hash_photos
from tec_cache.cache.writer import Crop, TargetArrays, commit_asked, commit_content, commit_targets, commit_views
from tec_cache.codec import Codec
from tec_cache.codec.errors import TargetErrors
from tec_cache.data.image_pool import ImagePool
from tec_cache.progress import Progress
from tec_cache.store import Store, open_store
from tec_cache.types import Targets

T = TypeVar("T")

NO_PHOTOS = hash_photos([])
"""Stands for the photos of the sample, which come from many shards."""

MOST_ROWS = 512
"""Views of which targets are made, at most."""
FEWEST_FITTED = 96
"""Views from which a codec is fitted, at least, whatever time that takes: from 32 its targets come out 20 % larger
than from 352, from 64 3 %, from 96 1 %."""
PROBED = 4
"""Views that tell how many more there is time for."""
SETTLED = 0.9
"""Share of the time of a view that is left, at least, when twice as many are tried, where their number no longer
matters."""
MOST_WRITTEN = 1 << 28
"""Bytes of targets that are written to try the disk, at most."""


LEARNING = 0.6
"""Exponent with which the surplus of unseen views falls with the number of fitted ones. On DINOv2 ViT-S they take
13 % more at 64 fitted views, 7 % at 96, 6 % at 128, 2 % at 256; from 96 this exponent gives the size at 512 to 1 %."""


@dataclass(frozen=True)
class Written:
    """What one committed row costs."""

    seconds: float
    num_bytes: float
    record_bytes: float


@dataclass(frozen=True)
class ViewCosts:
    """What the views of one photo cost."""

    sampled: int
    """Photos that were looked at."""
    broken: tuple[str, ...]
    """Those of them that cannot be used, and why."""
    read: float
    """Seconds of one photo."""
    cut: float
    """Seconds of decoding one photo, cropping it, and JPEG of all its views, with all threads at work."""
    written: Written
    """Of one crop."""


@dataclass(frozen=True)
class TargetCosts:
    """What the targets of one view cost, in seconds and bytes."""

    views: int
    """That were measured."""
    base: float
    """With the decoding of the next batch beneath it."""
    decode: float
    """Alone, with all threads."""
    encode: float
    fit: float
    """Of the codec on one view, its targets being there; zero where nothing is left to fit."""
    check: float
    """Of measuring the errors of one view."""
    written: Written
    unseen: float
    """How many more bytes, as a share, a view takes that the codec was not fitted on; `written` is of views that it
    was fitted on. Zero for a codec that is there already, and for exact."""
    codec_bytes: int = 0
    """Of the codec's parameters, once, where they are not there yet."""
    own_device: bool = False
    """Whether the base works on a GPU, beside the cores, and not on them."""


@contextmanager
def scratch(store: Store) -> Iterator[str]:
    """Give a folder (or URL) of its own on the disk of the cache; nothing is left of it afterwards."""
    name = f"{layout.SCRATCH}{uuid.uuid4().hex[:12]}"
    if store.folder is None:
        url = f"{store.address}/{name}"
        try:
            yield url
        finally:
            place = open_store(url)
            for file in place.names(""):
                place.remove(file)
        return
    folder = store.folder.absolute()
    if folder.is_dir():
        # what is left of a plan that was killed is cleared by the next extraction
        root, ours = folder / layout.DRAFTS, not (folder / layout.DRAFTS).exists()
        root.mkdir(exist_ok=True)
    else:
        root, ours = next(path for path in folder.parents if path.is_dir()), False
    try:
        (root / name).mkdir()
        yield str(root / name)
    finally:
        rmtree(root / name, ignore_errors=True)
        if ours:
            with suppress(OSError):  # another job has begun to use it
                root.rmdir()


def sample_cache(cache: Cache, place: str) -> Cache:
    """Return a cache of the same settings in a scratch folder, over one shard that stands for the sample."""
    source = {"limit": None, "shards": [{"name": "sample"}]}
    identity = cache.identity | {"source": source, "group_size": max(MOST_ROWS, cache.identity["group_size"])}
    return Cache(open_store(place), manifest_body(identity, {}))


def measure_crops(cache: Cache, cut: Cut, unit_rows: int, *, quiet: bool) -> Written:
    """Commit the crops of the sample in units of the real size; what does not fill one is left out."""
    first = Unit(0, 0, len(cut.crops))
    commit_views(
        cache.store, first, cut.crops[0][:1], [], cache.fingerprint, photos_sha256=NO_PHOTOS
    )  # makes folders, loads code
    size, count = min(unit_rows, len(cut.crops[0])), len(cut.crops[0])
    names = []
    with Progress("plan: crops to disk", quiet=quiet) as progress:
        for view, crops in enumerate(cut.crops):
            for group in range(count // size):
                unit, part = Unit(0, group, view), crops[group * size : (group + 1) * size]
                record = commit_views(cache.store, unit, part, [], cache.fingerprint, photos_sha256=NO_PHOTOS)
                names.append(layout.views_record(unit))
                progress.advance(size, record.payload.size if record.payload else 0)
        return _written(cache.store, names, progress.done, progress.bytes, progress.seconds)


def measure_targets(
    cache: Cache, job: TargetJob, crops: list[Crop], codec: Codec | None, unit_rows: int, pool: ImagePool,
    *, seconds: float, quiet: bool,
) -> TargetCosts:  # fmt: skip
    """Make, encode and commit the targets of a sample of views.

    Leaves a small finished cache of one unit behind. codec: that of the target set, where it was fitted already.
    unit_rows: rows of a real unit.
    """
    import zarr  # noqa: F401  (its loading is not to be measured)

    store, unit = cache.store, Unit(0, 0, 0)
    with Progress("plan: targets", quiet=quiet) as progress:
        fewest = FEWEST_FITTED if codec is None and job.quality.fitted else BLOCK_ROWS
        crops = crops[: _rows_in(seconds, job, crops, pool, fewest)]
        progress.expect(len(crops))
        commit_asked(store, 1, cache.fingerprint)
        views = commit_views(store, unit, crops, [], cache.fingerprint, photos_sha256=NO_PHOTOS)
        source = SourceRecord(
            shard="sample",
            size=0,
            ends_sha256="",
            photos=len(crops),
            groups=1,
            damage="",
            passed_over={},
            group_sha256=[NO_PHOTOS],
        )
        source.create(store, layout.source_record(0))
        commit_content(cache)
        found, seconds_of_base = _through_base(cache, job, unit, pool, progress)
    made, fit = (codec, 0.0) if codec is not None else timed(lambda: new_codec(job, iter(found)))
    coder: Codec = made
    _, check = timed(lambda: TargetErrors().add(found[0], recoded(coder, found[0], job.spec)))
    coded, encode = timed(lambda: [coder.encode(targets, job.spec) for targets in found])
    parameters = commit_codec(cache, job, coder, len(crops), 0, {}).record.payload
    arrays = TargetArrays(len(crops), coder.arrays(job.spec))
    for batch in coded:
        arrays.add(batch)
    _, once = timed(lambda: _commit(cache, job, unit, arrays, views))
    size = job.base.input_size
    _, decode = timed(lambda: list(pool.map(lambda crop: resize(decode_crop(crop.jpeg), size), crops)))
    return TargetCosts(
        views=len(crops),
        base=seconds_of_base / len(crops),
        decode=decode / len(crops),
        encode=encode / len(crops),
        fit=fit / len(crops) if job.quality.fitted else 0.0,
        check=check / len(found[0].features),
        written=_write_units(cache, job, arrays, views, unit_rows, seconds / 4 / max(once, 1e-3)),
        unseen=_unseen(cache.store, job, coder, found) if codec is None and job.quality.fitted else 0.0,
        codec_bytes=parameters.size if parameters and codec is None else 0,
        own_device=job.compute.device.type != "cpu",
    )


def _through_base(
    cache: Cache, job: TargetJob, unit: Unit, pool: ImagePool, progress: Progress
) -> tuple[list[Targets], float]:
    """Run the base over a unit as `extract` does, decoding the next crops meanwhile; return targets and seconds."""
    found: list[tuple[Batch, Targets]] = []
    begin = time.monotonic()
    with Stages() as stages:
        ahead = batches_ahead(job)
        places = Places(job, pool, ahead + 2, stages.check)
        for part in stages.ahead(unit_batches(cache, job, [unit], places), ahead):
            if part.batch is not None:
                found.append((part.batch, targets_of(job, part.batch.decoded())))
                part.batch.done()
            progress.advance(len(part.rows))
        wait_for_device()
    seconds = time.monotonic() - begin
    for batch, targets in found:
        batch.require_finite(targets)
    return [targets for _, targets in found], seconds


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return what `work` gives and the seconds it took, the device's own work included."""
    begin = time.monotonic()
    result = work()
    wait_for_device()
    return result, time.monotonic() - begin


def settled(seconds_of: Callable[[int], float], most: int, device: torch.device) -> float:
    """Return the seconds of one view, by how long some take at once.

    On a CPU a few tell. A GPU takes as long for a few as for many, since launching its kernels takes longer than they
    do: there it is twice as many again and again, each number tried once before, until a view takes no less.
    """
    count = min(PROBED, most)
    per_view = seconds_of(count) / count
    while device.type != "cpu" and count < most:
        count, before = min(2 * count, most), per_view
        seconds_of(count)
        per_view = min(before, seconds_of(count) / count)
        if per_view > SETTLED * before:
            break
    return per_view


def wait_for_device() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rows_in(seconds: float, job: TargetJob, crops: list[Crop], pool: ImagePool, fewest: int) -> int:
    """Return for how many views there is time: whole blocks, at least `fewest` views where there are so many."""

    def seconds_of(count: int) -> float:
        part = crops[:count]
        return timed(lambda: list(targets_of_crops(job, [c.jpeg for c in part], [c.key for c in part], pool)))[1]

    seconds_of(PROBED)
    per_view = settled(seconds_of, min(len(crops), job.batch_size), job.compute.device)
    rows = min(max(fewest, int(seconds / per_view)), MOST_ROWS, len(crops))
    return rows // BLOCK_ROWS * BLOCK_ROWS or rows


def _commit(cache: Cache, job: TargetJob, unit: Unit, arrays: TargetArrays, views: ViewsRecord) -> Any:
    codec = Cache(cache.store, cache.manifest)[job.name].codec_record.payload
    sha256 = codec.sha256 if codec else ""
    return commit_targets(cache.store, job.name, unit, arrays, views, job.fingerprint, sha256)


def _unseen(store: Store, job: TargetJob, codec: Codec, found: list[Targets]) -> float:
    """Estimate what views cost more that the real fit will not see: what one half costs in a codec of the other.

    A codec fits its own sample too well, the more so the smaller that is; what it costs falls with the sample.
    """
    whole = _joined(found)
    count = len(whole.features) // 2
    if count < 2:
        return 0.0
    half, other = (_rows_of(whole, slice(start, start + count)) for start in (0, count))
    sizes = []
    for coder in (new_codec(job, iter([half])), codec):
        with store.draft() as path:
            write_zip(path, coder.encode(other, job.spec), coder.arrays(job.spec))
            sizes.append(path.stat().st_size)
    return max(0.0, sizes[0] / sizes[1] - 1) * (count / job.fit_views) ** LEARNING


def _joined(found: list[Targets]) -> Targets:
    parts = zip(*(_tensors(t) for t in found), strict=True)
    return Targets(*(None if part[0] is None else torch.cat(part) for part in parts))  # type: ignore[arg-type]


def _rows_of(targets: Targets, rows: slice) -> Targets:
    return Targets(*(None if t is None else t[rows] for t in _tensors(targets)))  # type: ignore[arg-type]


def _tensors(targets: Targets) -> tuple[torch.Tensor | None, ...]:
    return targets.features, targets.attention, targets.rows, targets.class_token


def _write_units(
    cache: Cache, job: TargetJob, arrays: TargetArrays, views: ViewsRecord, unit_rows: int, most: float
) -> Written:
    """Commit the sample again in units of the real size: divided, or repeated as often as time and room allow."""
    free = cache.store.free()
    room = min(MOST_WRITTEN, free // 4) if free is not None else MOST_WRITTEN
    fit = min(unit_rows // arrays.count, int(most), room // max(1, row_bytes(arrays.specs) * arrays.count))
    times, size = max(1, fit), min(unit_rows, arrays.count)
    names, rows, num_bytes, spent = [], 0, 0, 0.0
    for group, start in enumerate(range(0, arrays.count, size), start=1):
        part = slice(start, start + size)
        keys = views.keys[part] * times
        large = TargetArrays(len(keys), arrays.specs)
        for _ in range(times):
            large.add({name: values[part] for name, values in arrays.arrays.items()})
        unit = Unit(0, group, 0)
        record, seconds = timed(partial(_commit, cache, job, unit, large, replace(views, keys=keys)))
        names += [layout.target_record(job.name, unit)]
        rows, num_bytes, spent = rows + len(keys), num_bytes + record.payload.size, spent + seconds
    return _written(cache.store, names, rows, num_bytes, spent)


def _written(store: Store, records: list[str], rows: int, num_bytes: int, seconds: float) -> Written:
    return Written(seconds / rows, num_bytes / rows, sum(store.size(name) or 0 for name in records) / rows)


def begin_target_set(cache: Cache, job: TargetJob) -> TargetJob:
    """Write the manifest of a target set into a scratch cache; return the job as one of that cache."""
    identity = {
        "base": job.base.identity,
        "input_size": job.base.input_size,
        "resizer": RESIZER,
        "last_layers": job.base.last_layers,
        "spec": job.spec.to_json(),
        "codec": job.quality.to_json(job.fit_views),
        "device": job.compute.device.type,
        "precision": job.compute.precision,
        "batch_size": job.batch_size,
        "threads": None,
        "cache": cache.fingerprint,
    }
    ensure_manifest(cache.store, layout.target_manifest(job.name), identity, {"base": job.base.name}, what="", todo="")
    return replace(job, fingerprint=fingerprint(identity))


def sampled_views(job: TargetJob, most: int) -> tuple[int, int]:
    """Return how many views `extract` fits the codec from and checks it on, where there are `most`."""
    if not job.quality.fitted:
        return 0, min(EXACT_CHECKED, most)
    checked = max(1, min(MOST_CHECKED, job.fit_views // 4))
    share = min(1.0, most / (job.fit_views + checked))
    return round(job.fit_views * share), round(checked * share)
