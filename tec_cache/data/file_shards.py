"""What all shards have in common that are one file each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Self

from tec_cache.data.contents import Contents, file_contents
from tec_cache.data.files import ShardFile
from tec_cache.data.labels import Labels
from tec_cache.data.photos import Shard


@dataclass(frozen=True)
class FileShard(Shard):
    """A file that holds photos, each with its label in a field."""

    in_bytes: ClassVar[bool] = True
    labels_in_field: ClassVar[bool] = True

    file: ShardFile
    labels: Labels = field(default_factory=Labels)

    @property
    def place(self) -> str:
        """Path or URL, without credentials."""
        return self.file.where

    @cached_property
    def contents(self) -> Contents:
        """Size and ends of the file."""
        return file_contents(self.file)

    def with_classes(self, classes: tuple[str, ...]) -> Self:
        """Return the same shard with labels that are names of these classes."""
        return replace(self, labels=replace(self.labels, classes=classes))

    def with_labels(self, labels: Labels) -> Self:
        """Return the same shard with labels that are where `labels` says."""
        return replace(self, labels=labels)
