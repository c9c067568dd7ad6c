"""A parquet file of photos, read one group of rows after another, or a single photo.

pyarrow says nothing of what it reads by: each of its reads is one request here for a part of the file, on a disk as
behind a URL, so that a failing network is told from damage.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

from tec_cache.data.files import ShardFile, unreadable_shard
from tec_cache.data.parquet_columns import Columns, columns_of
from tec_cache.errors import ConfigError, SourceError, StorageError, TecCacheError

REQUEST = 8 << 20
"""Bytes of a column that are asked for at a time."""
MOST_ROWS = 1024
TOGETHER = 32 << 20
"""Bytes of photos that are decompressed at a time, by the mean of their group, or MOST_ROWS rows."""
MOST_TOGETHER = 2 << 30
"""Bytes that such rows may become at worst, were each of them as long as its group: a dictionary has a value once for
any number of rows."""


class Row(NamedTuple):
    """A row of a table."""

    number: int
    data: bytes | None
    """Of the photo; None where it has none. Empty where they were not wanted."""
    path: str | None
    label: Any
    """As Python has it."""


class Table:
    """An open parquet file of photos.

    Raises SourceError for what is no parquet file, ConfigError for columns that hold no photos (`columns_of`) and
    where pyarrow is missing, StorageError where the disk or the network fails.
    """

    def __init__(self, file: ShardFile, label_field: str | None) -> None:
        parquet = parquet_module(file.where)
        self.file = file
        with _damage_told(file):
            self._stream = _Stream(file)
            self._parquet = parquet.ParquetFile(
                _pyarrow().PythonFile(self._stream, mode="r"),
                buffer_size=REQUEST, pre_buffer=False, page_checksum_verification=True,
            )  # fmt: skip
            schema = self._parquet.schema_arrow
        self.columns: Columns = columns_of(schema, label_field, file.where)

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first row of each group, and behind them the number of all rows."""
        starts, about = [0], self._parquet.metadata
        with _damage_told(self.file):
            for group in range(about.num_row_groups):
                starts.append(starts[-1] + about.row_group(group).num_rows)
        return starts

    @property
    def most_group_bytes(self) -> int:
        """Bytes of the largest group, without compression."""
        return max(map(self._group_bytes, range(len(self.starts) - 1)), default=0)

    def rows(self, *, photos: bool = True) -> Iterator[Row]:
        """Yield all rows in order, with the bytes of their photos or without.

        Raises SourceError at the point where the file is damaged, StorageError.
        """
        wanted = [f"{self.columns.image}.path"] if self.columns.has_path else []
        wanted += [self.columns.label] if self.columns.label is not None else []
        wanted += [f"{self.columns.image}.bytes"] if photos else []
        for group in range(len(self.starts) - 1):
            number = self.starts[group]
            for batch in self._batches(group, wanted, self._rows_together(group) if photos else MOST_ROWS):
                yield from self._rows_of(batch, number)
                number += len(batch)

    def label_values(self) -> Iterator[Any]:
        """Yield what the label column has for each row; None where there is no such column. Raises as `rows` does."""
        wanted = [self.columns.label] if self.columns.label is not None else []
        for group in range(len(self.starts) - 1):
            for batch in self._batches(group, wanted, MOST_ROWS):
                yield from batch.column(0).to_pylist() if wanted else [None] * len(batch)

    def photo(self, number: int) -> bytes | None:
        """Return the bytes of one photo; None where it has none.

        Its group is read from its beginning to there. Raises SourceError where the table has no such row.
        """
        if not 0 <= number < self.starts[-1]:
            raise SourceError(f"row {number:,} of {self.starts[-1]:,}: the shard has changed")
        group = bisect_right(self.starts, number) - 1
        left = number - self.starts[group]
        for batch in self._batches(group, [f"{self.columns.image}.bytes"], min(8, self._rows_together(group))):
            if left < len(batch):
                data: bytes | None = batch.column(0).field("bytes")[left].as_py()
                return data
            left -= len(batch)
        raise SourceError(f"row {number:,} is missing in its group: the shard is damaged")

    def _batches(self, group: int, columns: list[str], rows: int) -> Iterator[Any]:
        """Yield a group in record batches of at most so many rows."""
        with _damage_told(self.file):
            every = self._parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
            yield from every

    def _rows_of(self, batch: Any, start: int) -> Iterator[Row]:
        place = batch.schema.get_field_index(self.columns.image)
        image = batch.column(place) if place >= 0 else None
        fields = [] if image is None else [child.name for child in image.type]
        data = image.field("bytes") if image is not None and "bytes" in fields else None
        paths = image.field("path") if image is not None and "path" in fields else None
        labels = batch.column(batch.schema.get_field_index(self.columns.label)) if self.columns.label else None
        for i in range(len(batch)):
            yield Row(
                start + i,
                b"" if data is None else data[i].as_py(),
                None if paths is None else _text(paths[i]),
                None if labels is None else labels[i].as_py(),
            )

    def _group_bytes(self, group: int) -> int:
        """Return the bytes of a group without compression; those of the file where the file does not say."""
        # nothing is asked of its columns: where those make no sense, pyarrow's metadata end the process
        size = int(self._parquet.metadata.row_group(group).total_byte_size)
        return size if size > 0 else max(1, self._stream.size)

    def _rows_together(self, group: int) -> int:
        size, rows = self._group_bytes(group), self.starts[group + 1] - self.starts[group]
        return max(1, min(TOGETHER * rows // size, MOST_TOGETHER // size, MOST_ROWS))


def parquet_module(where: str) -> Any:
    """Return `pyarrow.parquet`. Raises ConfigError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        what = f"parquet files are read by pyarrow, which cannot be imported ({error})"
        raise ConfigError(what, where=where, todo="pip install 'tec-cache[parquet]'") from error
    return pyarrow.parquet


def _pyarrow() -> Any:
    import pyarrow

    return pyarrow


def _text(value: Any) -> str | None:
    try:
        text: str | None = value.as_py()
    except UnicodeDecodeError:
        return None
    return text


@contextmanager
def _damage_told(file: ShardFile) -> Iterator[None]:
    """Make SourceErrors of what pyarrow says of a file that makes no sense."""
    try:
        yield
    except (TecCacheError, MemoryError):
        raise
    except (_pyarrow().ArrowException, OSError, ValueError) as error:  # what a file gives raises TecCacheErrors
        text = " ".join(str(error).split())[:300].rstrip(".")
        todo = "make or copy the shard again, or --on-error skip to use what comes before the damage"
        raise SourceError(f"damaged shard: {text}", where=file.where, todo=todo) from error


class _Stream:
    """A shard's file as pyarrow reads it."""

    closed = False

    def __init__(self, file: ShardFile) -> None:
        self._file, self._at = file, 0
        try:
            self.size = file.size()
        except TecCacheError:
            raise
        except Exception as error:  # network libraries have errors of their own
            raise unreadable_shard(error, file) from error

    def read(self, size: int = -1) -> bytes:
        """Read at most so many bytes; all that are left where it is negative."""
        end = self.size if size < 0 else min(self.size, self._at + size)
        data = self._part(self._at, end) if self._at < end else b""
        self._at += len(data)
        return data

    def _part(self, start: int, end: int) -> bytes:
        try:
            data = self._file.part(start, end)
        except TecCacheError:
            raise
        except ValueError as error:  # what fsspec says of a web server that answers with the whole file
            raise ConfigError(
                "its server gives no parts of a file, and a parquet file is read in parts",
                where=self._file.where,
                todo="copy the file to a disk, or put simplecache:: before the URL, which does so",
            ) from error
        except Exception as error:
            raise unreadable_shard(error, self._file) from error
        if len(data) != end - start:
            what = f"{len(data):,} bytes came where {end - start:,} were asked for"
            raise StorageError(what, where=self._file.where, todo="check the disk or the network")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position: from the beginning, from here, or from the end."""
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that any position can be gone to."""
        return True

    def close(self) -> None:
        """Do nothing: each part is opened and closed by itself."""
