"""What `tec-cache rounds` says: a table of the rounds, and beforehand disk and hours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tec_cache.printable import block, counted, shell_words
from tec_cache.progress import human_bytes, human_seconds

if TYPE_CHECKING:
    from pipelines.rounds import RoundsSummary


def rounds_text(summary: RoundsSummary, dry_run: bool, go_on: str) -> str:
    """Say what the rounds did; go_on: the command that does the rest."""
    lines = [f"rounds       {summary.out}, over the crops of {summary.cache}"]
    if summary.rounds:
        lines += ["", *_table(summary.rounds), ""]
    if dry_run:
        lines += _estimate_text(summary.estimate) if summary.estimate else ["nothing is left to do"]
        lines += ["left to do", *(f"  {command}" for command in summary.commands)] if summary.commands else []
        lines.append("dry run: nothing was written")
    elif summary.finished:
        last = f"{summary.out}/{summary.rounds[-1]['export']}"
        lines.append(f"next         tec-cache finetune {shell_words([last])} --train SHARDS --test SHARDS --out RUN")
    else:
        lines += ["interrupted: what is finished is kept; go on with", f"  {go_on}"]
    return block(lines)


def rounds_info_text(found: dict[str, Any]) -> str:
    """Say how far a folder of rounds is."""
    lines = [
        f"rounds       {found['folder']}",
        f"learned from {found['first']}, then each round from the one before; weights of the next: {found['start']}",
        f"done         {counted(len(found['done']), 'call')}"
        + (f", {found['done'][-1]} the last" if found["done"] else ""),
    ]
    return block(lines + (["", *_table(found["rounds"])] if found["rounds"] else []))


def _table(rounds: list[dict[str, Any]]) -> list[str]:
    """Return a line for each round, columns of equal width; what a round does not have yet stands as a dash."""
    rows = [["round", "learned from", "loss", "kNN", "linear", "targets", "base calls", "time"]]
    for one in rounds:
        scores, hours = one["scores"], sum(one["hours"].values())
        target = (one["target"] + (" (removed)" if one["removed"] else "")) if one["target"] else "as given"
        rows.append(
            [
                str(one["number"]),
                target,
                f"{one['losses']['loss']:.4f}" if one["losses"] else "-",
                *(f"{scores[name]:.2%}" if name in scores else "-" for name in ("probe_knn", "probe_linear")),
                human_bytes(one["target_bytes"]) if one["target_bytes"] else "-",
                f"{one['base_calls']:,}" if one["base_calls"] else "-",
                human_seconds(3600 * hours) if hours else "-",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _estimate_text(found: dict[str, Any]) -> list[str]:
    """Say what the rounds that are left will take."""
    trainings, extractions = found["trainings"], found["extractions"]
    one_training, one_extraction = (human_seconds(3600 * found[f"hours_{n}"]) for n in ("training", "extraction"))
    room = {True: "it fits", False: "IT DOES NOT FIT", None: "nobody can say whether it fits"}[found["fits"]]
    free = "" if found["free_cache"] is None else f", {human_bytes(found['free_cache'])} are free beside the cache"
    return [
        f"time         about {human_seconds(3600 * found['hours'])}: "
        f"{counted(trainings, 'training')} of {one_training}, {counted(extractions, 'extraction')} of {one_extraction}",
        f"disk         {human_bytes(found['bytes_sets'])} of targets at once "
        f"({counted(found['sets_at_once'], 'set')} of {human_bytes(found['bytes_set'])}, "
        f"measured on an untrained model), {human_bytes(found['bytes_runs'])} of runs and exports{free}: {room}",
    ]
