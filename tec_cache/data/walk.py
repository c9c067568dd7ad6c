"""Going through a folder of photos: linked folders are entered, hidden names left out, and everything else counted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tec_cache.data.passed_over import HIDDEN, SPECIAL, PassedOver, is_hidden
from tec_cache.data.photos import IMAGE_SUFFIXES
from tec_cache.data.readers import reader_of
from tec_cache.errors import SourceError

CYCLES = "links to a folder that they are in"


@dataclass
class Walk:
    """What a folder holds."""

    photos: list[str] = field(default_factory=list)
    """Paths below the folder, with '/' between the parts, sorted."""
    folders: set[str] = field(default_factory=set)
    """Names of the folders right below it, hidden ones left out."""
    passed_over: PassedOver = field(default_factory=PassedOver)
    shard: str = ""
    """One of the files in it that are shards, where there are any."""


def walk(root: Path) -> Walk:
    """Go through a folder and all below it. Raises SourceError where a folder cannot be read."""
    found = Walk()
    # of each folder that is still to be read: its path below the root, and device and inode of those that it is in
    left: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while left:
        path, above = left.pop()
        chain = (*above, _identity(root / path))
        for entry in _entries(root / path):
            name = f"{path}/{entry.name}" if path else entry.name
            if is_hidden(entry.name):
                found.passed_over.add(HIDDEN)
            elif _is_folder(entry):
                if entry.is_symlink() and _identity(root / name) in chain:
                    found.passed_over.add(CYCLES)
                    continue
                left.append((name, chain))
                if not path:
                    found.folders.add(name)
            else:
                _file(found, entry, name)
    found.photos.sort()
    return found


def _file(found: Walk, entry: os.DirEntry[str], name: str) -> None:
    """Note a photo, or count what is none. A link that leads nowhere is a photo that cannot be read."""
    if _is_special(entry):
        found.passed_over.add(SPECIAL)
    elif name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and "." in entry.name:
        found.photos.append(name)
    else:
        found.passed_over.add_file(entry.name)
        if reader_of(entry.name) is not None:
            found.shard = min(found.shard or name, name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.is_file() and not stat.S_ISREG(entry.stat().st_mode)
    except OSError:  # a link that leads nowhere
        return False


def _identity(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise SourceError(
            f"a folder of the photos cannot be read: {error.strerror}",
            where=str(folder),
            todo="make it readable, or leave it out",
        ) from error
