"""What of an input is no photo: names that are nobody's data, and the counts of what was passed over, by kind."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

HIDDEN = "hidden"
NO_SUFFIX = "files without a suffix"
SIDE_IMAGES = "images beside a sample's own"
LONELY_MASKS = "masks without a photo"
METADATA = "metadata of WebDataset"
SYMBOLIC_LINKS = "symbolic links"
SPECIAL = "devices, pipes and sockets"
OTHER = "other files"
MOST_KINDS = 40
"""Kinds that are told apart in the end: a record holds them, and suffixes come from strangers."""
_MOST_COUNTED = 4096


class PassedOver(Counter[str]):
    """Kind -> how many."""

    def add(self, kind: str, count: int = 1) -> None:
        """Count something of a kind."""
        self[kind if kind in self or len(self) < _MOST_COUNTED else OTHER] += count

    def add_file(self, name: str) -> None:
        """Count a file that is no photo by its suffix."""
        self.add(kind_of(name))

    def told(self) -> dict[str, int]:
        """Return the counts in the order of their kinds, the rarest of too many kinds as other files."""
        kinds = sorted(self, key=lambda kind: (-self[kind], kind))
        told = Counter({kind: self[kind] for kind in kinds[:MOST_KINDS]})
        for kind in kinds[MOST_KINDS:]:
            told[OTHER] += self[kind]
        return dict(sorted(told.items()))


def kind_of(name: str) -> str:
    """Name the kind of a file: '.txt files'."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in ("", "."):
        return NO_SUFFIX
    plain = suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) <= 9
    return f"{suffix} files" if plain else OTHER


def is_hidden(name: str) -> bool:
    """Say whether a file or folder is a system's or a program's own, and none of the data: .DS_Store, __MACOSX."""
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def is_hidden_path(path: str) -> bool:
    """Say whether any part of a path is hidden."""
    return any(is_hidden(part) for part in path.split("/"))


def passed_over_text(counts: dict[str, int]) -> str:
    """Say the counts in one line, the largest first."""
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
    return ", ".join(f"{kind} ({counts[kind]:,})" for kind in kinds)
