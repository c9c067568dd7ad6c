"""What tells one source shard from another of the same name before it is read: its size, and its first and last bytes.

Nothing of a machine is in it, no time and no host: a copy of a shard has the contents of the original.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tec_cache.data.files import END, LocalFile, ShardFile
from tec_cache.errors import SourceError, StorageError, TecCacheError

if TYPE_CHECKING:
    from tec_cache.data.photos import Shard

READERS = 16
"""Shards whose contents are read at a time."""


class Contents(NamedTuple):
    """The contents of a shard, as far as they cost little."""

    size: int
    """Bytes; of all files, for a part of a folder."""
    ends_sha256: str
    num_read: int = 0
    """Bytes that were read for it."""

    def to_json(self) -> dict[str, int | str]:
        """Return what the identity of a cache says of them."""
        return {"size": self.size, "ends_sha256": self.ends_sha256}


def file_contents(file: ShardFile) -> Contents:
    """Return the contents of a tar: SHA-256 of its size (8 bytes, little endian), its first and its last 64 KiB.

    Of a compressed tar, the compressed bytes. Costs two requests for parts of the file beside the one for its size. A
    web server that gives no parts is asked for the whole, which is read in pieces: contents may not depend on the way
    that a shard comes. Raises StorageError.
    """
    try:
        size, first, last, whole = file.ends()
    except TecCacheError:
        raise
    except Exception as error:
        todo = "check the disk or the network, and run the same command again"
        raise StorageError(f"the shard cannot be read: {file.explained(error)}", where=file.where, todo=todo) from error
    digest = hashlib.sha256(size.to_bytes(8, "little") + first + last)
    return Contents(size, digest.hexdigest(), size if whole else len(first) + len(last))


def folder_contents(files: Sequence[tuple[str, Path]]) -> Contents:
    """Return the contents of a part of a folder of photos: (name, path) of each.

    SHA-256 over each name and size, then over the first 64 KiB of the first and of the last photo. A name is preceded
    by its length, sizes and lengths are 8 bytes, little endian. A photo that cannot be read counts as empty; reading
    it for its views is what reports it. Costs a look at each file; two are opened.
    """
    digest, total = hashlib.sha256(), 0
    for name, path in files:
        size, data = _size(path), name.encode()
        digest.update(len(data).to_bytes(8, "little") + data + size.to_bytes(8, "little"))
        total += size
    ends = [_first_bytes(path) for _, path in (files[0], files[-1])]
    digest.update(b"".join(ends))
    return Contents(total, digest.hexdigest(), sum(len(data) for data in ends))


def read_contents(shards: Iterable[Shard], each: Callable[[Contents], object] = lambda _: None) -> list[Contents]:
    """Return the contents of shards, several read at a time, and tell `each` of them in turn. Raises StorageError."""
    found = []
    with ThreadPoolExecutor(READERS, thread_name_prefix="contents") as pool:
        futures = [pool.submit(lambda shard=shard: shard.contents) for shard in shards]  # type: ignore[misc]
        try:
            for future in futures:
                found.append(future.result())
                each(found[-1])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _first_bytes(path: Path) -> bytes:
    try:
        with LocalFile(str(path)).open() as stream:
            return stream.read(END)
    except (OSError, SourceError):
        return b""
