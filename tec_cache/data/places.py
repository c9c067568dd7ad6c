"""From the text that a user gives to the shards it names: a path, a pattern, a URL, a chain of them.

- What exists is taken as it is before it is read as a pattern: `set[1]/shard-{0..3}.tar` lies in the folder `set[1]`.
- Braces are expanded first, in paths and URLs alike; then `*`, `?` and `[...]` are matched, on any file system.
- In http(s) URLs a question mark begins the query, and is no pattern.
- `::` chains file systems as fsspec does (`simplecache::https://...`, `zip://*.tar::photos.zip`); it separates nothing.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from tec_cache.data.file_shards import FileShard
from tec_cache.data.files import LocalFile, ShardFile
from tec_cache.data.folders import refuse_split_files
from tec_cache.data.photos import plain_text
from tec_cache.data.readers import NOUNS, READERS, TAR, reader_of
from tec_cache.data.remote import connect, literal_as_far_as_there
from tec_cache.errors import SourceError, StorageError, TecCacheError, nearest
from tec_cache.urls import scrubbed, without_secrets

MOST_FILES = 100_000
"""Paths that braces may give."""

_RANGE = re.compile(r"(-?[0-9]{1,4000})\.\.(-?[0-9]{1,4000})")

REQUESTS = 16
"""Requests to a store at a time."""


def existing_folder(source: str) -> Path | None:
    """Return the folder that a text names as it stands; None for anything else."""
    path = _local_path(source)
    return Path(path) if path is not None and _there(path) and os.path.isdir(path) else None


def shards_in(folder: Path) -> list[FileShard]:
    """Return the files of a folder that are shards, sorted by name, without hidden ones; none where it holds none.

    Of several kinds those of the first in `READERS`: what writes tars may write a table of captions beside each. Raises
    SourceError where something else has the name of a shard, LayoutError where they are several parts of a data set.
    """
    return _as_shards(_shards_in(str(folder)), str(folder))


def file_shards(source: str) -> list[FileShard]:
    """Return the shards that a path, pattern or URL of files names, in its order.

    A file that no reader knows by its name is taken for a tar. Raises SourceError where it names none, what is no
    file, or files of several kinds; LayoutError where one pattern matches several parts of a data set; StorageError
    where the files cannot be reached; ConfigError where a package is missing that reads them.
    """
    shown = without_secrets(source)
    try:
        files = [file for text in _expanded(source) for file in _files_of(text)]
        if not files:
            raise SourceError("no shard matches", where=shown, todo="check the pattern; quote it in the shell")
        return _as_shards(files, shown)
    except ImportError as error:  # fsspec names the package that a kind of URL needs
        raise SourceError(f"{error}", where=shown, todo="install that package into this environment") from error
    except TecCacheError:
        raise
    except Exception as error:  # network libraries have errors of their own: no credentials, no route
        what = f"the photos cannot be reached: {scrubbed(f'{type(error).__name__}: {error}', source)}"
        raise StorageError(what, where=shown, todo="check the address, the network and the credentials") from error


def _expanded(source: str) -> Iterator[str]:
    """Expand braces, unless the text is the path of something."""
    path = _local_path(source)
    if path is not None and _there(path):
        yield source
        return
    shown = without_secrets(source)
    too_many = SourceError(f"braces give more than {MOST_FILES:,} paths", where=shown, todo="give fewer")
    if any(abs(int(first) - int(last)) >= MOST_FILES for first, last in _RANGE.findall(source)):
        raise too_many  # braceexpand would list the whole range at once
    try:
        texts = list(islice(braceexpand(source), MOST_FILES + 1))
    except ValueError as error:
        todo = r"close each brace; write \{ for one that belongs to a name"
        raise SourceError("the braces of this pattern do not match", where=shown, todo=todo) from error
    if len(texts) > MOST_FILES:
        raise too_many
    yield from texts


def _files_of(text: str) -> Iterator[ShardFile]:
    """Return what one path or URL names: itself where it exists, else what it matches as a pattern."""
    path = _local_path(text)
    if path is None:
        yield from _of_one_part(list(connect(text).files()), without_secrets(text))
    elif os.path.isdir(path):
        files = _shards_in(path)
        if not files:
            todo = f"give folders of {' or '.join(NOUNS)}, or one folder of photos by itself"
            what = f"this folder, one of several paths, holds no {' and no '.join(NOUNS)}"
            raise SourceError(what, where=path, todo=todo)
        yield from files
    elif not glob.has_magic(path) or _there(path):
        yield LocalFile(path)
    else:
        pattern = literal_as_far_as_there(path, "*?[", _there)
        yield from _of_one_part([LocalFile(match) for match in sorted(glob.glob(pattern, recursive=True))], path)


def _shards_in(folder: str) -> list[ShardFile]:
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    kinds = ([name for name in names if reader_of(name) is reader] for reader in READERS)
    chosen = next((kind for kind in kinds if kind), [])
    return _of_one_part([LocalFile(os.path.join(folder, name)) for name in chosen], folder)


def _of_one_part(files: Sequence[ShardFile], where: str) -> list[ShardFile]:
    """Return the files of a folder or pattern. Raises LayoutError where they are several parts of a data set."""
    refuse_split_files([file.parts[-1] for file in files if file.parts], where)
    return list(files)


def _local_path(text: str) -> str | None:
    """Return the path on a disk that a text stands for; None for a URL or a chain."""
    if _there(text):
        return text
    if "::" not in text:
        for prefix in ("file://", "local://"):
            if text.startswith(prefix):
                return text.removeprefix(prefix)
        if "://" not in text:
            return os.path.expanduser(text) if text.startswith("~") else text
    return None


def _there(path: str) -> bool:
    """Say whether there is anything at a path, were it a link into nowhere."""
    try:
        return os.path.lexists(path)
    except ValueError:  # a zero byte, which no path has
        return False


def _as_shards(files: list[ShardFile], where: str) -> list[FileShard]:
    """Name the files and ask for their sizes.

    Raises SourceError for the first that is not there, and for files of several kinds.
    """
    names = _names(files)
    readers = [(reader_of(file.parts[-1]) if file.parts else None) or TAR for file in files]
    if len(set(readers)) > 1:
        kinds = " and ".join(reader.noun for reader in READERS if reader in readers)
        raise SourceError(f"{kinds} lie here together", where=where, todo="give a pattern that matches one kind")
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="sizes") as pool:
        sizes = list(pool.map(_size, files))
    shards = []
    for reader, name, file, size in zip(readers, names, files, sizes, strict=True):
        if isinstance(size, FileNotFoundError | NotADirectoryError):
            near = nearest(file.parts[-1], file.neighbours()) if file.parts else ""
            raise SourceError(
                f"there is no such file or folder{near}", where=file.where, todo="check the name"
            ) from size
        if isinstance(size, Exception):
            raise size
        shards.append(reader.open(name, size, file))
    return shards


def _size(file: ShardFile) -> int | Exception:
    try:
        return file.size()
    except Exception as error:
        return error


def _names(files: list[ShardFile]) -> list[str]:
    """Name shards by their file names, or by their paths below the common folder where names repeat."""
    parts = [file.parts for file in files]
    if len({p[-1:] for p in parts}) == len(parts):
        return [plain_text("".join(p[-1:])) for p in parts]
    for number, path in enumerate(parts):
        if path in parts[:number]:
            twin = files[parts.index(path)]
            queries = "://" in twin.address and twin.address != files[number].address
            what = "two URLs name one shard: a query is no part of its name" if queries else "a shard is named twice"
            raise SourceError(what, where=files[number].where, todo="list every shard once")
    common = 0
    while len({p[: common + 1] for p in parts}) == 1:
        common += 1
    common = min(common, *(len(p) - 1 for p in parts))
    return [plain_text("/".join(p[common:])) for p in parts]
