"""What lies at a place: a cache or pack with its photos, views and target sets, a run, an export, or rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.describing.info_export import describe_export
from pipelines.describing.info_rounds import describe_rounds
from pipelines.describing.info_run import describe_run
from pipelines.extraction.label_counts import LabelCounter, indexed_counts
from tec_cache.cache.index.heading import ViewsHeading
from tec_cache.cache.index.reading import UnitIndex
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.cache.target_set import TargetSet
from tec_cache.codec.quality import Quality
from tec_cache.data.passed_over import PassedOver
from tec_cache.errors import ConfigError
from tec_cache.kinds import Kind, contents, what_is
from tec_cache.store import is_url


def info(path: str) -> dict[str, Any]:
    """Describe what lies at a path or URL as plain values; "kind" says what it is.

    Raises ConfigError where it is nothing that this program makes, CacheError, TecCacheError or WeightsError where it
    is damaged.
    """
    kind, folder = what_is(path), Path(path.removeprefix("file://"))
    if not is_url(path) and not folder.exists():
        raise ConfigError("there is nothing here", where=path, todo="check the path")
    if kind is Kind.RUN:
        found = describe_run(folder)
    elif kind is Kind.EXPORT:
        found = describe_export(folder)
    elif kind is Kind.ROUNDS:
        found = describe_rounds(folder)
    elif kind is Kind.OTHER:
        raise ConfigError(
            f"this is no cache, pack, run, export or rounds, but {contents(folder)}",
            where=path,
            todo="give the folder that extract --cache, pack, train --out, export or rounds --out made",
        )
    else:
        found = describe_cache(path)
    return {"kind": kind.value, **found}


def describe_cache(path: str) -> dict[str, Any]:
    """Describe a cache or pack from its records. Raises ConfigError where there is none, or CacheError."""
    cache = open_cache(path)
    index = cache.index
    if index is not None and index.heading.num_views == cache.num_views:
        about = _indexed_views(cache, index)
    else:
        about = _recorded_views(cache)
    plan = cache.identity["views"]
    return {
        "cache": cache.store.url,
        "format": cache.manifest["format"],
        "fingerprint": cache.fingerprint,
        "size": plan["size"],
        "grid": cache.grid,
        "crop": plan["crop"],
        "seed": plan["seed"],
        "jpeg": cache.identity["jpeg"],
        "source_shards": len(cache.shards),
        "num_views": cache.num_views,
        **about,
        "index": _index_state(cache),
        "targets": {name: _target_set(cache[name]) for name in cache.target_names},
    }


def _index_state(cache: Cache) -> str:
    """Say whether the cache's views have an index: whole, absent, or why it is not used."""
    if cache.index is None:
        return cache.index_problem or "absent"
    return "whole" if cache.index.heading.num_views == cache.num_views else "of fewer views than were asked for"


def _indexed_views(cache: Cache, index: UnitIndex[ViewsHeading]) -> dict[str, Any]:
    """Describe the views by their index, which shows that nothing is missing."""
    entries = index.entries
    first = entries[entries["view"] == 0]
    passed_over = PassedOver()
    passed_over.update(index.heading.passed_over)
    views = []
    for view in range(index.heading.num_views):
        of = entries[entries["view"] == view]
        photos, size = (int(of[name].sum(dtype=np.int64)) for name in ("rows", "payload_bytes"))
        views.append({"photos": photos, "bytes": size})
    return {
        "views": views,
        "labels": indexed_counts(index.heading.labels, cache.identity).to_json(),
        "skipped_photos": int(first["skipped"].sum(dtype=np.int64)),
        "noted_photos": int(first["noted"].sum(dtype=np.int64)),
        "passed_over": passed_over.told(),
        "unread_shards": 0,
        "missing_units": 0,
    }


def _recorded_views(cache: Cache) -> dict[str, Any]:
    """Describe the views by their records."""
    views: list[dict[str, Any]] = [{"photos": 0, "bytes": 0} for _ in range(cache.num_views)]
    skipped, noted, labels = 0, 0, LabelCounter()

    def counts(unit: Unit) -> tuple[int, int, int, int, list[int | None]]:
        record = cache.views_record(unit)
        size = record.payload.size if record.payload else 0
        return len(record.keys), size, len(record.skipped), len({key for key, _ in record.notes}), record.labels

    found = cache.of_units(cache.view_units, counts)
    for unit, (photos, size, broken, notes, numbers) in zip(cache.view_units, found, strict=True):
        views[unit.view]["photos"] += photos
        views[unit.view]["bytes"] += size
        skipped += broken if unit.view == 0 else 0
        noted += notes if unit.view == 0 else 0
        labels.add(numbers if unit.view == 0 else ())
    sources = [cache.source_record(number) for number in range(len(cache.shards))]
    passed_over = PassedOver()
    for record in sources:
        passed_over.update(record.passed_over if record else {})
    return {
        "views": views,
        "labels": labels.counts(cache.identity).to_json(),
        "skipped_photos": skipped,
        "noted_photos": noted,
        "passed_over": passed_over.told(),
        "unread_shards": sum(record is None for record in sources),
        "missing_units": len(cache.missing_units(cache.num_views)),
    }


def known_facts(notes: Any) -> list[list[str]]:
    """Return what a target set's notes say of its base; notes decide nothing, so any other content says nothing."""
    rows = notes if isinstance(notes, list) else []
    return [[str(part) for part in row] for row in rows if isinstance(row, list) and len(row) == 3]


def _target_set(target: TargetSet) -> dict[str, Any]:
    """Describe one target set."""
    cache, codec = target.cache, target.codec_record if target.fitted else None
    index = target.index if codec else None
    if index is not None and index.heading.num_views == cache.num_views:
        units, missing, rows, size = len(index), 0, index.num_rows, index.num_bytes
    else:
        units, missing, rows, size = _recorded_targets(target)
    return {
        "base": target.manifest["notes"]["base"],
        "weights_sha256": target.identity["base"]["weights_sha256"],
        "facts": known_facts(target.manifest["notes"].get("facts")),
        "computed": {name: target.identity.get(name) for name in ("device", "precision", "batch_size", "threads")},
        "quality": str(Quality.from_json(target.identity["codec"])),
        "asked_errors": Quality.from_json(target.identity["codec"]).asked,
        "errors": codec.errors if codec else {},
        "fitted_views": codec.fitted_views if codec else 0,
        "checked_views": codec.checked_views if codec else 0,
        "codec_bytes": codec.payload.size if codec and codec.payload else 0,
        **target.spec.to_json(),
        "last_layers": target.identity["last_layers"],
        "views": rows,
        "bytes": size,
        "bytes_per_view": size / rows if rows else 0.0,
        "finished_units": units,
        "missing_units": missing,
    }


def _recorded_targets(target: TargetSet) -> tuple[int, int, int, int]:
    """Return the finished and the missing units of a target set, its rows and its bytes, from its records."""
    cache = target.cache
    there = [unit for unit in target.units if unit in cache.view_unit_set]

    def counts(unit: Unit) -> tuple[int, int]:
        record = target.record(unit)
        return record.count, record.payload.size if record.payload else 0

    found = cache.of_units(there, counts) if target.fitted else []
    rows, size = (sum(column) for column in zip(*found, strict=True)) if found else (0, 0)
    return len(there), len(cache.missing_units(cache.num_views, target.name)), rows, size
