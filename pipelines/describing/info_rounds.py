"""What a folder of rounds says of itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.chaining.journal import read_journal


def describe_rounds(folder: Path) -> dict[str, Any]:
    """Describe rounds as plain values. Raises TecCacheError where rounds.json cannot be understood."""
    journal = read_journal(folder)
    assert journal is not None  # it is what makes the folder one of rounds
    first = ", ".join(f"{of['name']}:{of['weight']:g}" for of in journal.settings["targets"]) or "pixels"
    return {
        "folder": str(folder),
        "first": first,
        "start": journal.settings["start"],
        "done": journal.done,
        "rounds": [asdict(one) for one in journal.rounds],
    }
