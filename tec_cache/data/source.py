"""What an input is: a folder of photos, or files by folder, pattern or URL (`readers`); and its shards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tec_cache.data.classes import find_labels
from tec_cache.data.file_shards import FileShard
from tec_cache.data.folders import open_folder
from tec_cache.data.labels import Labels
from tec_cache.data.passed_over import HIDDEN, PassedOver, is_hidden
from tec_cache.data.photos import Shard
from tec_cache.data.places import existing_folder, file_shards, shards_in


@dataclass(frozen=True)
class Source:
    """The photos of an input, in shards, and what their labels mean."""

    shards: list[Shard]
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers; None where labels are numbers, or there are none."""
    label_field: str | None = None
    """Field of a tar's samples, or column of a table, that holds the label; None: the usual ones."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Kind -> how many things beside the shards, or in a folder of photos, are no photos."""
    remarks: tuple[str, ...] = ()
    """What was assumed of it, for people."""

    def with_classes(self, classes: tuple[str, ...] | None) -> Source:
        """Return the same photos with labels that are numbers of these classes."""
        if classes is None:
            return self
        return replace(self, classes=classes, shards=[shard.with_classes(classes) for shard in self.shards])

    def with_labels(self, *, quiet: bool = True) -> Source:
        """Return the same photos with labels as `find_labels` finds them, where these are in fields without a list."""
        if self.classes is not None or not any(shard.labels_in_field for shard in self.shards):
            return self
        labels, remark = find_labels(self.shards, self.label_field, quiet=quiet)
        shards = [shard.with_labels(labels) for shard in self.shards]
        remarks = (*self.remarks, remark) if remark else self.remarks
        return replace(self, shards=shards, classes=labels.classes, label_field=labels.field, remarks=remarks)

    def with_masks(self) -> Source:
        """Return the same photos with their masks: KEY.seg.png beside KEY.jpg, in a tar as in a folder.

        Raises ConfigError for shards that have none.
        """
        beside = frozenset(name for shard in self.shards for name in shard.mask_names())
        return replace(self, shards=[shard.with_masks(beside) for shard in self.shards])


def open_source(
    source: str, *, seed: int = 0, classes: tuple[str, ...] | None = None, label_field: str | None = None
) -> Source:
    """Find the photos of an input.

    source: a folder of photos (`CLASS/NAME.jpg` or flat), a folder of tars or parquet files, or a pattern of them
    with braces (`train-{000000..001280}.tar`) or globs (`train-*.parquet`), local or a URL that fsspec knows
    (`data.places`).
    seed: order in which a folder of photos is cut into shards.
    classes: names in the order of their numbers; a folder's own class folders where there are none. Without them the
    labels of files are taken for numbers: see `Source.with_labels`.
    label_field: of files, where their labels are; None: the usual fields or columns.

    Raises SourceError, LayoutError, ConfigError or StorageError: of `places.file_shards` and `folders.open_folder`.
    """
    path = existing_folder(source)
    if path is None:
        return _of_files(file_shards(source), label_field).with_classes(classes)
    if files := shards_in(path):
        beside = _beside({file for shard in files for file in shard.file.parts[-1:]}, path)
        return replace(_of_files(files, label_field), passed_over=beside.told()).with_classes(classes)
    folder = open_folder(path, seed)
    shards: list[Shard] = list(folder.shards)
    return Source(shards, folder.classes, None, folder.passed_over.told(), folder.remarks).with_classes(classes)


def _beside(shards: Collection[str], folder: Path) -> PassedOver:
    """Count what lies in a folder beside files of these names."""
    beside = PassedOver()
    for entry in sorted(folder.iterdir()):
        if is_hidden(entry.name):
            beside.add(HIDDEN)
        elif entry.is_dir():
            beside.add("folders")
        elif entry.name not in shards:
            beside.add_file(entry.name)
    return beside


def _of_files(shards: Sequence[FileShard], label_field: str | None) -> Source:
    """Return a source of files whose labels are in a field."""
    return Source([shard.with_labels(Labels(label_field)) for shard in shards], label_field=label_field)
