"""The kinds of files that an input may consist of: a line here for each, and a module that reads it.

What holds none of these files is a folder of photos (`folders`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tec_cache.data.apart import TAR_SUFFIXES
from tec_cache.data.file_shards import FileShard
from tec_cache.data.files import ShardFile
from tec_cache.data.parquet import open_parquet
from tec_cache.data.tars import TarShard


@dataclass(frozen=True)
class Reader:
    """A kind of file."""

    noun: str
    """Its plural, for messages."""
    suffixes: tuple[str, ...]
    """Of the names by which it is known, in lower case."""
    open: Callable[[str, int, ShardFile], FileShard]
    """From a shard's name, its bytes and its file to the shard. Raises ConfigError where a package is missing."""
    never: frozenset[str] = frozenset()
    """Names with such a suffix that are something else."""

    def takes(self, name: str) -> bool:
        """Say whether a file name is one of this kind."""
        return name.lower().endswith(self.suffixes) and name.lower() not in self.never


TAR = Reader("tars", TAR_SUFFIXES, TarShard)
# a folder of photos of the Hugging Face hub may have a table of captions beside them
PARQUET = Reader("parquet files", (".parquet",), open_parquet, frozenset({"metadata.parquet"}))

READERS = (TAR, PARQUET)
NOUNS = tuple(reader.noun for reader in READERS)


def reader_of(name: str) -> Reader | None:
    """Return the reader that knows a file by its name; None for a file that is no shard, as far as its name says."""
    return next((reader for reader in READERS if reader.takes(name)), None)
