"""What cannot be used, counted whole and named in part: a data set may have millions of it."""

from __future__ import annotations

from dataclasses import dataclass

MOST_NAMED = 8
"""Names that are kept."""


@dataclass
class LeftOut:
    """Photos that are left out, and why the first of them are."""

    count: int = 0
    named: tuple[str, ...] = ()

    def add(self, text: str) -> None:
        """Count one more; text: which, and why."""
        self.count += 1
        if len(self.named) < MOST_NAMED:
            self.named = (*self.named, text)

    def join(self, others: LeftOut) -> None:
        """Count those of another part, which come after these."""
        self.count += others.count
        self.named = (self.named + others.named)[:MOST_NAMED]

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        more = f"; and {self.count - len(self.named):,} more" if self.count > len(self.named) else ""
        return f"{self.count:,}: {'; '.join(self.named)}{more}"
