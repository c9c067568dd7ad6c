"""A parquet file of photos, as the image data sets of the Hugging Face hub are made of."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tec_cache.data.file_shards import FileShard
from tec_cache.data.files import LocalFile, ShardFile
from tec_cache.data.labels import Label, Labels
from tec_cache.data.parquet_columns import LABELS
from tec_cache.data.parquet_table import Row, Table, parquet_module
from tec_cache.data.passed_over import PassedOver
from tec_cache.data.photos import IMAGE_SUFFIXES, MOST_PHOTO_BYTES, Extent, Home, OneByOneError, Photo
from tec_cache.errors import ConfigError, SourceError

MOST_GROUP = 32 << 20
"""Bytes of a row group's photos where single ones are read: half of them on average, for each. The hub's groups are
100 photos; of 110 KB each, one takes 11 ms of a core, as much as to decode and augment it."""
MOST_KEY = 200
"""Characters of a path that is a key."""


def open_parquet(name: str, size: int, file: ShardFile) -> ParquetShard:
    """Return a parquet file as a shard, without looking into it. Raises ConfigError where pyarrow is missing."""
    parquet_module(file.where)
    return ParquetShard(name, size, file)


@dataclass(frozen=True)
class ParquetShard(FileShard):
    """A parquet file with a row for each photo.

    A photo's key is its path without suffix, where that is a plain one and the first of its name in the file; else the
    name of the file and the number of the row.
    """

    def photos(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the photos in order; a column of something else is not counted.

        Memory: 32 MB of photos and a few times one page of the file, which may hold a row group. Raises SourceError
        where the file is damaged or empty, ConfigError for columns that hold no photos, StorageError.
        """
        return self._given(self._table(self.labels), photos=True)

    def places(self, passed_over: PassedOver | None = None) -> Iterator[Photo]:
        """Yield the photos in order, of which only paths and labels are read: one without bytes is found by reading it.

        Raises OneByOneError for a file that is not on a disk, or whose row groups hold more than MOST_GROUP bytes.
        """
        table = self._table(self.labels)
        most = table.most_group_bytes
        if most > MOST_GROUP or not isinstance(self.file, LocalFile):
            why = f"whose row groups have up to {most >> 20:,} MB" if most > MOST_GROUP else "which is not on a disk"
            raise OneByOneError(
                f"photos are read in a random order, a row group for each, from a parquet file {why}",
                where=self.place,
                todo=f"copy it to a disk with row groups of less than {MOST_GROUP >> 20} MB (pyarrow: row_group_size), "
                "or make tars of it",
            )
        return self._given(table, photos=False)

    def _given(self, table: Table, *, photos: bool) -> Iterator[Photo]:
        keys, given = _Keys(self.name), 0
        for row in table.rows(photos=photos):
            number, note = self.labels.number(table.columns.read_label(row.label))
            key, problem = keys.of(row), _problem(row)
            given += 1
            if problem:
                yield Photo(key, b"", number, problem, note)
            else:
                yield Photo(key, row.data or b"", number, "", note, None if photos else Extent(row.number, -1))
        if not given:
            raise SourceError("the shard holds no photos", where=self.place, todo="leave it out")

    def home(self) -> Home:
        """Return what reads single photos."""
        return ParquetHome(self.place, self.file, self.size, self.labels.field)

    def label_values(self, labels: Labels) -> Iterator[tuple[Label, dict[str, bytes]]]:
        """Yield the label of each photo as it is written, and the names of the other columns; no photos are read."""
        table = self._table(labels)
        others = dict.fromkeys(table.columns.others, b"")
        for value in table.label_values():
            yield table.columns.read_label(value), others

    def class_names(self, labels: Labels) -> tuple[str, ...] | None:
        """Return the names in the metadata, of data sets whose labels have names."""
        return self._table(labels).columns.names

    def looked_for(self, labels: Labels) -> str:
        """Name the columns."""
        return f"a column {labels.field}" if labels.field else f"a column {', '.join(LABELS)}"

    def with_masks(self, beside: frozenset[str]) -> ParquetShard:
        """Raise ConfigError: masks are files."""
        todo = "give tars or a folder, with KEY.seg.png beside KEY.jpg"
        raise ConfigError("masks are not read from parquet files", where=self.place, todo=todo)

    def _table(self, labels: Labels) -> Table:
        return Table(self.file, labels.field)


def _problem(row: Row) -> str:
    """Say why the photo of a row cannot be used; empty where it can."""
    if row.data is None:
        return "its bytes are not in the file" + ("" if row.path is None else ", only a path")
    if len(row.data) > MOST_PHOTO_BYTES:
        return f"{len(row.data):,} bytes are more than any photo has (at most {MOST_PHOTO_BYTES:,})"
    return ""


class _Keys:
    """Keys of the rows of a file, each of them once."""

    def __init__(self, shard: str) -> None:
        self._stem = PurePosixPath(shard).stem
        self._numbered = re.compile(re.escape(self._stem) + r"-[0-9]+")
        self._taken: set[str] = set()

    def of(self, row: Row) -> str:
        """Return the key of the next row."""
        key = _plain(row.path)
        if not key or key in self._taken or self._numbered.fullmatch(key):
            return f"{self._stem}-{row.number:06d}"
        self._taken.add(key)
        return key


def _plain(path: str | None) -> str:
    """Return a path without its suffix; empty for one that says where the photo lay on some machine, or is no name."""
    if not path or len(path) > MOST_KEY or not path.isprintable() or path != path.strip():
        return ""
    if path.startswith("/") or "\\" in path or ":" in path or {"", ".", ".."} & set(path.split("/")):
        return ""
    stem, dot, suffix = path.rpartition(".")
    return stem if dot and suffix.lower() in IMAGE_SUFFIXES and not stem.endswith("/") else path


class ParquetHome(Home):
    """A parquet file on a disk, opened when the first photo is read. One thread reads at a time."""

    def __init__(self, place: str, file: ShardFile, size: int, label_field: str | None) -> None:
        self.place = place
        self._file, self._size, self._label_field = file, size, label_field
        self._table: Table | None = None
        self._lock = threading.Lock()

    def read(self, name: str, extent: Extent) -> bytes:
        """Read a photo; extent: its row."""
        with self._lock:
            if self._table is None:
                self._table = self._opened()
            data = self._table.photo(extent.offset)
        if problem := _problem(Row(extent.offset, data, None, None)):
            raise SourceError(problem)
        return data or b""

    def _opened(self) -> Table:
        try:
            size = self._file.size()
        except OSError:
            size = self._size  # opening it tells what is wrong
        if size != self._size:
            raise SourceError(f"it has {size:,} bytes, and had {self._size:,}: the shard has changed")
        return Table(self._file, self._label_field)

    def reopened(self) -> ParquetHome:
        """Return the same, not yet opened."""
        file: ShardFile = pickle.loads(pickle.dumps(self._file))
        return ParquetHome(self.place, file, self._size, self._label_field)

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetHome, (self.place, self._file, self._size, self._label_field)
