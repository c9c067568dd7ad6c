"""What a cache holds: photos, views, target sets, bytes, and what is missing."""

from __future__ import annotations

from typing import Any

from tec_cache.cache.reader import open_cache


def info(path: str) -> dict[str, Any]:
    """Describe a cache from its records, as plain values. Raises ConfigError or CacheError."""
    cache = open_cache(path)
    views: list[dict[str, Any]] = [{"photos": 0, "bytes": 0} for _ in range(cache.num_views)]
    skipped = 0
    for unit in cache.view_units:
        record = cache.views_record(unit)
        views[unit.view]["photos"] += len(record.keys)
        views[unit.view]["bytes"] += record.tar_bytes
        skipped += len(record.skipped) if unit.view == 0 else 0
    targets = {}
    for name in cache.target_names:
        target = cache[name]
        there = [u for u in cache.view_units if cache.layout.target_record(name, u).exists()]
        records = [target.record(unit) for unit in there]
        rows, size = sum(r.count for r in records), sum(r.num_bytes for r in records)
        targets[name] = {
            "base": target.manifest["notes"]["base"],
            "weights_sha256": target.identity["base"]["weights_sha256"],
            "codec": target.codec.name,
            **target.spec.to_json(),
            "last_layers": target.identity["last_layers"],
            "views": rows,
            "bytes": size,
            "bytes_per_view": size / rows if rows else 0.0,
            "missing_units": len(cache.missing_units(cache.num_views, name)),
        }
    plan = cache.identity["views"]
    return {
        "cache": path,
        "fingerprint": cache.fingerprint,
        "size": plan["size"],
        "grid": cache.grid,
        "crop": plan["crop"],
        "seed": plan["seed"],
        "jpeg": cache.identity["jpeg"],
        "source_shards": len(cache.shards),
        "num_views": cache.num_views,
        "views": views,
        "skipped_photos": skipped,
        "unread_shards": sum(cache.source_record(i) is None for i in range(len(cache.shards))),
        "missing_units": len(cache.missing_units(cache.num_views)),
        "targets": targets,
    }
