"""Caches: what is in them, bytes by part, errors as measured against as asked, and what was left out."""

from __future__ import annotations

from typing import Any

from pipelines.extraction.label_counts import LabelCounts, classes_text
from pipelines.reporting.charts import bars_plot
from pipelines.reporting.html import NOTHING, Html, element, grid, heading, joined, paragraph, picture, place, table
from pipelines.reporting.subjects import Subject, state
from tec_cache.cache.reader import Cache
from tec_cache.cache.target_set import TargetSet
from tec_cache.printable import counted
from tec_cache.progress import human_bytes

MOST_SKIPPED = 40
"""Skipped photos that are named; the others are counted."""
MOST_RECORDS = 2000
"""Records that are read for them: those of a whole ImageNet have 1,300 units of a view."""
MOST_ARRAYS = 100
"""Units whose arrays are weighed."""
MEANS = {"mse": "features, relative squared error", "kl": "attention rows, divergence in nats"}


def cache_section(subject: Subject, cache: Cache) -> Html:
    """Say what a cache or pack is and holds, by what its records say."""
    about = subject.about
    assert about is not None
    return joined([_facts(subject, about), _bytes(about, cache), _errors(about)])


def _facts(subject: Subject, about: dict[str, Any]) -> Html:
    labels = LabelCounts(**about["labels"])
    photos = about["views"][0]["photos"] if about["views"] else 0
    rows: list[list[object]] = [
        ["place", place(about["cache"])],
        ["state", state(subject)],
        ["photos", f"{photos:,}, from {counted(about['source_shards'], 'source shard')}"],
        ["views", f"{about['num_views']}, of {about['size']} pixels for {about['grid']} x {about['grid']} patches; "
                  f"{about['crop']} crop, seed {about['seed']}"],
        ["labels", classes_text(labels)],
        ["target sets", ", ".join(f"{name} ({of['base']})" for name, of in about["targets"].items())],
        ["left out", counted(about["skipped_photos"], "broken photo")],
    ]  # fmt: skip
    if about["missing_units"]:
        rows.append(["missing", f"{counted(about['missing_units'], 'unit')} of views"])
    if about["unread_shards"]:
        rows.append(["not read to the end", counted(about["unread_shards"], "source shard")])
    rows += [["missing", f"{counted(of['missing_units'], 'unit')} of {name}"] for name, of in about["targets"].items()
             if of["missing_units"]]  # fmt: skip
    rows += [["passed over", f"{count:,} {kind}"] for kind, count in about["passed_over"].items()]
    return table(["", ""], rows, caption="What it holds", numbers=False)


def _bytes(about: dict[str, Any], cache: Cache) -> Html:
    views = sum(of["photos"] for of in about["views"])
    if not views:
        return paragraph("It holds no view yet, so there is no size of one.", kind="note")
    crops = sum(of["bytes"] for of in about["views"]) / views
    parts = {"crops": crops} | {f"targets {name}": of["bytes_per_view"] for name, of in about["targets"].items()}
    rows: list[list[object]] = [["crops, and what names them", human_bytes(crops), f"{views:,}"]]
    for name, of in about["targets"].items():
        size = human_bytes(of["bytes_per_view"]) if of["views"] else None
        rows.append([f"targets {name}, quality {of['quality']}", size, f"{of['views']:,}"])
        for array, mean in array_bytes(cache[name]).items():
            rows.append([f"of them {array}", human_bytes(mean), None])
    drawn = {(f"target set {i}" if i else "crops"): size / 1000 for i, size in enumerate(parts.values())}
    said = "; ".join(f"{name} {human_bytes(size)}" for name, size in parts.items())
    plot = picture(bars_plot(drawn, "KB a view"), f"Bytes of a view: {said}",
                   "bytes of a view by part; target sets in the order of the table")  # fmt: skip
    counted = table(["part", "a view", "views"], rows, caption="Bytes of a view, by part")
    return joined([heading(4, "Bytes of a view"), counted, grid([plot], "plots")])


def array_bytes(target: TargetSet) -> dict[str, float]:
    """Return the bytes of a view in each stored array, from the records of up to MOST_ARRAYS units, evenly chosen.

    Nothing for a pack, whose records do not tell them apart.
    """
    units = [unit for unit in target.units if unit in target.cache.view_unit_set]
    records = [target.record(unit) for unit in units[:: -(-len(units) // MOST_ARRAYS) or 1]]
    views = sum(record.count for record in records)
    found: dict[str, int] = {}
    for record in records:
        for array, blocks in record.blocks.items():
            found[array] = found.get(array, 0) + sum(block[1] for block in blocks)
    return {array: size / views for array, size in found.items() if size}


def _errors(about: dict[str, Any]) -> Html:
    rows: list[list[object]] = []
    for name, of in about["targets"].items():
        for kind, meaning in MEANS.items():
            asked, found = of["asked_errors"].get(kind), of["errors"].get(kind)
            if asked is None and found is None:
                continue
            inside = None if asked is None or found is None else "yes" if found <= asked else "no"
            rows.append([f"{name}: {meaning}", _number(asked), _number(found), inside,
                         _number(of["errors"].get(f"{kind}_max")), f"{of['checked_views']:,}"])  # fmt: skip
    if not rows:
        return NOTHING
    head = ["target set", "asked", "measured", "within", "worst view", "views measured on"]
    return joined([heading(4, "Errors of stored targets"), table(head, rows, caption="Measured on photos that the "
                   "codec was not fitted on; quality exact has no asked error")])  # fmt: skip


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def skipped_section(cache: Cache) -> Html:
    """Name the photos that were left out, and why: from the records of the first view."""
    units = [unit for unit in cache.view_units if unit.view == 0]
    found: list[tuple[str, str]] = []
    total = 0
    for unit in units[:MOST_RECORDS]:
        skipped = cache.views_record(unit).skipped
        total += len(skipped)
        found += [(str(key), str(reason)) for key, reason in skipped[: MOST_SKIPPED - len(found)]]
    if not found:
        return NOTHING
    rows = [[element("code", key), reason] for key, reason in found]
    more = f"; {total - len(found):,} more not named here" if total > len(found) else ""
    part = f" in the first {MOST_RECORDS:,} of {len(units):,} units" if len(units) > MOST_RECORDS else ""
    caption = f"{counted(total, 'photo')} left out{part}{more}"
    return joined([heading(4, "Skipped photos"), table(["photo", "why"], rows, caption=caption, numbers=False)])
