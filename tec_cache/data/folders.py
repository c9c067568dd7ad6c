"""A folder of photos, treated as if it were shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tec_cache.cache.record import hash_keys
from tec_cache.data.contents import Contents, folder_contents
from tec_cache.data.photos import IMAGE_SUFFIXES, Photo, Shard, plain_text
from tec_cache.data.tars import SHARD_SUFFIXES
from tec_cache.errors import SourceError
from tec_cache.rng import key64, permutation

FOLDER_SHARD = 1024
"""Photos per shard when a folder is cut into shards."""


@dataclass(frozen=True)
class FolderShard(Shard):
    """A part of a folder of photos; labels are the numbers of the class folders in sorted order."""

    root: Path
    files: tuple[tuple[str, int | None], ...]

    @property
    def place(self) -> str:
        """The folder."""
        return f"{self.root} (part {self.name})"

    @cached_property
    def contents(self) -> Contents:
        """Names and sizes of the photos, and the beginning of two."""
        return folder_contents([(plain_text(key), self.root / key) for key, _ in self.files])

    def identity(self) -> dict[str, Any]:
        """Name, contents, and the hash of the photos' names, which decide what is in it."""
        return super().identity() | {"files_sha256": hash_keys(plain_text(key) for key, _ in self.files)}

    def photos(self) -> Iterator[Photo]:
        """Yield the photos in the order of the seeded permutation."""
        for key, label in self.files:
            try:
                yield Photo(plain_text(key), (self.root / key).read_bytes(), label)
            except OSError as error:
                yield Photo(plain_text(key), b"", label, f"cannot be read: {error.strerror}")


def folder_shards(root: Path, seed: int) -> list[Shard]:
    """Cut a folder of photos into shards by a seeded permutation, so that no shard holds one class only."""
    files = sorted(
        p.relative_to(root).as_posix()
        for p in root.rglob("*")
        if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and p.is_file()
    )
    if not files:
        raise SourceError(
            "the folder holds neither photos nor tars",
            where=str(root),
            todo="give a folder of CLASS/NAME.jpg, or a pattern such as 'shards/*.tar'",
        )
    classes = folder_classes(str(root)) or []
    numbers = {name: i for i, name in enumerate(classes)}
    order = permutation(key64("folder", seed, len(files)), len(files))
    labelled = [(files[i], numbers.get(files[i].split("/")[0]) if "/" in files[i] else None) for i in order]
    parts = [tuple(labelled[i : i + FOLDER_SHARD]) for i in range(0, len(labelled), FOLDER_SHARD)]
    return [FolderShard(f"folder-{i:06d}", len(part), root, part) for i, part in enumerate(parts)]


def folder_classes(source: str) -> list[str] | None:
    """Return the class folders of a folder of photos, in the order of their labels; None for shards."""
    root = Path(source)
    if not root.is_dir() or any(p.name.lower().endswith(SHARD_SUFFIXES) for p in root.iterdir()):
        return None
    return sorted(p.name for p in root.iterdir() if p.is_dir())
