"""The file of results: read, added to part by part, and written whole each time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tec_cache.cache.identity import require_same
from tec_cache.store.files import write_atomically

FILE = "gpu.json"


@dataclass
class Results:
    """What is known of each part: its rows, or how it failed."""

    path: Path
    machine: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path, machine: dict[str, Any]) -> Results:
        """Take up a file of results. IdentityError where it is of another machine, size, or version of anything."""
        if not path.exists():
            return cls(path, machine)
        stored = json.loads(path.read_text())
        require_same(stored["machine"], machine, what="the results", where=str(path), todo="name another --out")
        return cls(path, machine, stored["parts"])

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Add what a part found, and write the file: a kill at any moment leaves the one before it, or this one."""
        self.parts[name] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps({"machine": self.machine, "parts": self.parts}, indent=2).encode())


def tables(stored: dict[str, Any]) -> str:
    """Write a file of results as markdown: the machine, and a table for each part."""
    machine = ", ".join(str(value) for value in stored["machine"].values())
    lines = [f"Machine of every figure below: {machine}.", ""]
    for name, part in stored["parts"].items():
        lines += [f"### {name}", "", f"{part['question']} `{part['command']}`, {part['seconds']:.0f} s", ""]
        lines += [f"Failed: {part['failed']}"] if "failed" in part else table(part["rows"])
        lines.append("")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of one table, its columns those of all rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([written(row.get(name)) for name in columns] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def written(value: Any) -> str:
    """Write a figure so that its first four digits are seen; what is not known is left open."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if 0.99 < abs(value) < 1:  # a cosine: how far it is from one is what counts
            return f"{value:.6f}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
