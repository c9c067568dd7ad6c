"""How many photos of a cache have a label, how many classes those are, and what their names are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tec_cache.cache.index.heading import Labels
from tec_cache.printable import counted, have

SHOWN = 5
"""Names of classes that are printed."""


@dataclass
class LabelCounts:
    """Labels of the photos that have views, by now."""

    photos: int = 0
    labelled: int = 0
    classes: int = 0
    """Classes that have a photo."""
    first: int | None = None
    last: int | None = None
    """Lowest and highest number of a class that has a photo."""
    names: list[str] | None = None
    """Names of all classes in the order of their numbers; None where labels are numbers, or there are none."""
    field: str | None = None
    """Field of a tar's samples that holds the label; None: the usual ones, or class folders."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass
class LabelCounter:
    """Adds up the labels of units."""

    photos: int = 0
    labelled: int = 0
    numbers: set[int] = field(default_factory=set)

    def add(self, labels: Iterable[int | None]) -> None:
        """Count the labels of a unit of the first view."""
        every = list(labels)
        known = [label for label in every if label is not None]
        self.photos += len(every)
        self.labelled += len(known)
        self.numbers.update(known)

    def counts(self, identity: dict[str, Any]) -> LabelCounts:
        """Return the counts, with the class list of a cache's identity."""
        return LabelCounts(
            photos=self.photos,
            labelled=self.labelled,
            classes=len(self.numbers),
            first=min(self.numbers, default=None),
            last=max(self.numbers, default=None),
            names=identity.get("classes"),
            field=identity.get("label_field"),
        )


def indexed_counts(labels: Labels, identity: dict[str, Any]) -> LabelCounts:
    """Return the counts that an index holds, with the class list of a cache's identity."""
    return LabelCounts(
        photos=labels.photos,
        labelled=labels.labelled,
        classes=labels.classes,
        first=labels.first,
        last=labels.last,
        names=identity.get("classes"),
        field=identity.get("label_field"),
    )


def classes_text(counts: LabelCounts) -> str:
    """Say the number of classes and the first names in one line."""
    where = f" (in the field {counts.field})" if counts.field else ""
    if counts.names is not None:
        more = ", ..." if len(counts.names) > SHOWN else ""
        text = f"{len(counts.names):,}{where}: {', '.join(counts.names[:SHOWN])}{more}"
        if counts.photos and counts.classes < len(counts.names):
            text += f"; {counts.classes:,} of them {have(counts.classes)} photos"
    elif counts.labelled:
        text = f"{counts.classes:,}{where}, labels are numbers from {counts.first} to {counts.last}"
    else:
        return f"no labels{where}" if counts.photos else "not known before the photos are read"
    without = counts.photos - counts.labelled
    return text + (f"; {without:,} of {counted(counts.photos, 'photo')} {have(without)} no label" if without else "")
