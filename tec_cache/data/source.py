"""What an input is: a folder of photos, a folder of tars, a pattern or a URL of tars; and the shards that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tec_cache.data.apart import SHARD_SUFFIXES
from tec_cache.data.classes import find_labels
from tec_cache.data.folders import FolderShard, open_folder
from tec_cache.data.labels import Labels
from tec_cache.data.passed_over import HIDDEN, PassedOver, is_hidden
from tec_cache.data.photos import MASK_SUFFIX, Shard
from tec_cache.data.places import existing_folder, tar_shards, tars_in
from tec_cache.data.tars import TarShard


@dataclass(frozen=True)
class Source:
    """The photos of an input, in shards, and what their labels mean."""

    shards: list[Shard]
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers; None where labels are numbers, or there are none."""
    label_field: str | None = None
    """Field of a tar's samples that holds the label; None: the usual ones (`tec_cache.data.labels`)."""
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
        """Return the same photos with labels as `find_labels` finds them, where they are tars without a class list."""
        tars = [shard for shard in self.shards if isinstance(shard, TarShard)]
        if self.classes is not None or not tars:
            return self
        labels, remark = find_labels(tars, self.label_field, quiet=quiet)
        shards: list[Shard] = [replace(shard, labels=labels) for shard in tars]
        remarks = (*self.remarks, remark) if remark else self.remarks
        return replace(self, shards=shards, classes=labels.classes, label_field=labels.field, remarks=remarks)

    def with_masks(self) -> Source:
        """Return the same photos with their masks: KEY.seg.png beside KEY.jpg, in a tar as in a folder."""
        folders = [shard for shard in self.shards if isinstance(shard, FolderShard)]
        beside = frozenset(name for shard in folders for name in shard.files if name.lower().endswith(MASK_SUFFIX))
        return replace(self, shards=[shard.with_masks(beside) for shard in self.shards])


def open_source(
    source: str, *, seed: int = 0, classes: tuple[str, ...] | None = None, label_field: str | None = None
) -> Source:
    """Find the photos of an input.

    source: a folder of photos (`CLASS/NAME.jpg` or flat), a folder of tars, or a pattern of tars with braces
    (`train-{000000..001280}.tar`) or globs (`train-*.tar`), local or a URL that fsspec knows (`data.places`).
    seed: order in which a folder of photos is cut into shards.
    classes: names in the order of their numbers; a folder's own class folders where there are none. Without them the
    labels of tars are taken for numbers: see `Source.with_labels`.
    label_field: of tars, where their labels are; None: the usual fields.
    """
    path = existing_folder(source)
    if path is None:
        return _of_tars(tar_shards(source), label_field).with_classes(classes)
    if tars := tars_in(path):
        return replace(_of_tars(tars, label_field), passed_over=_beside_tars(path).told()).with_classes(classes)
    folder = open_folder(path, seed)
    shards: list[Shard] = list(folder.shards)
    return Source(shards, folder.classes, None, folder.passed_over.told(), folder.remarks).with_classes(classes)


def _beside_tars(folder: Path) -> PassedOver:
    """Count what lies in a folder of tars and is none."""
    beside = PassedOver()
    for entry in sorted(folder.iterdir()):
        if is_hidden(entry.name):
            beside.add(HIDDEN)
        elif entry.is_dir():
            beside.add("folders")
        elif not entry.name.lower().endswith(SHARD_SUFFIXES):
            beside.add_file(entry.name)
    return beside


def _of_tars(tars: Sequence[TarShard], label_field: str | None) -> Source:
    """Return a source of tars whose labels are in a field."""
    return Source([replace(shard, labels=Labels(label_field)) for shard in tars], label_field=label_field)
