"""A cache behind a URL that fsspec knows: s3://, gs://, memory:// and others.

An object appears whole or not at all, so a payload needs no temporary name. `create` asks the store for a
conditional write; whether it keeps the condition is tried, not believed (`require_conditional_create`).

What is not there is a FileNotFoundError, as on a disk. All else that a network does is a StorageError: nothing is
known then about the object, least of all that it is damaged.
"""

from __future__ import annotations

import errno
import functools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec

from tec_cache.errors import GO_ON, ConfigError, StorageError, TecCacheError
from tec_cache.store.drafts import temporary_file
from tec_cache.store.names import checked_name
from tec_cache.store.store import MOST_WHOLE
from tec_cache.urls import UNUSED_USER, UNUSED_USER_TODO, scrubbed, split_url, user_unused, without_secrets
from tec_cache.web import refusal_behind

P = ParamSpec("P")
T = TypeVar("T")

GAP = 64 * 1024
"""Ranges of one file that are nearer to each other are read by one request: a request costs more than 64 KB."""

TOO_LARGE = "this is no document of a cache: look at it, and remove it if nobody needs it"

CREATE_ATTEMPTS = 5
"""S3 asks to try again (409) where two creations of one object overlap."""


def _explained(method: Callable[P, T]) -> Callable[P, T]:
    """Turn what network libraries raise into StorageError; their own classes are not known here."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except TecCacheError:
            raise
        except Exception as error:
            if _absent(error):
                raise
            if not isinstance(error, OSError) and type(error).__module__ == "builtins":
                raise  # a bug, not the network
            store: Any = args[0]
            raise _storage_error(error, store) from error

    return call


def _absent(error: Exception) -> bool:
    """Say whether an error means that there is no such object, and nothing else."""
    return isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket" and refusal_behind(error) is None


def _storage_error(error: Exception, store: RemoteStore) -> StorageError:
    """Say what a store refused, and what a user can do about it."""
    if isinstance(error, FileNotFoundError):
        error = refusal_behind(error) or error
    text = scrubbed(str(getattr(error, "strerror", None) or error), store.address) or type(error).__name__
    url = store.url
    if _code(error) == "NoSuchBucket":
        return StorageError(text, where=url, todo=f"create the bucket, or check its name; {GO_ON}")
    if isinstance(error, PermissionError) or "redential" in text:
        todo = f"check the credentials, which must allow to list, read, write and delete objects; {GO_ON}"
        return StorageError(f"the store refuses access: {text}", where=url, todo=todo)
    todo = f"check the network and the store's address; {GO_ON}"
    return StorageError(f"the store does not answer as it should: {text}", where=url, todo=todo)


def _code(error: BaseException) -> str:
    """Return the error code that S3 gave, where it gave one."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    try:
        return str(response["Error"]["Code"])  # type: ignore[index]
    except (KeyError, TypeError):
        return ""


def _refuse_unreadable(url: str) -> None:
    """Raise ConfigError for URLs below which no file could be named."""
    if "::" in url:
        todo = "name the store itself; for local copies of what is read, train --stage DIR"
        raise ConfigError("a cache cannot lie behind `::`", where=without_secrets(url), todo=todo)
    scheme, _, rest = url.partition("://")
    if split_url(scheme, rest).query:
        what = "the URL of a cache can have no query: its files are named below it"
        todo = "leave it out; give credentials as the kind of store wants them (for s3: AWS_ACCESS_KEY_ID)"
        raise ConfigError(what, where=without_secrets(url), todo=todo)


class RemoteStore:
    """Objects below one URL."""

    def __init__(self, url: str) -> None:
        self.address = url.rstrip("/")
        self.url = without_secrets(self.address)
        self.folder: Path | None = None
        _refuse_unreadable(self.address)
        try:
            # what other processes write must be seen at once
            self.fs, self.root = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        except ImportError as error:
            todo = "install that package into this environment (for s3://: pip install 'tec-cache[s3]')"
            raise ConfigError(f"{error}", where=self.url, todo=todo) from error
        except ValueError as error:
            todo = "use a folder, s3://BUCKET/PATH or another URL of fsspec"
            raise ConfigError(scrubbed(f"{error}", self.address), where=self.url, todo=todo) from error
        self.root = str(self.root).rstrip("/")
        if user_unused(self.address, self.root):
            raise ConfigError(UNUSED_USER, where=self.url, todo=UNUSED_USER_TODO)

    def _path(self, name: str) -> str:
        return f"{self.root}/{checked_name(name, self.url)}"

    def place(self, name: str) -> str:
        """Return the object's URL."""
        return f"{self.url}/{name}"

    @_explained
    def size(self, name: str) -> int | None:
        """Return the bytes of an object, None where there is none."""
        try:
            return int(self.fs.size(self._path(name)))
        except FileNotFoundError as error:
            if not _absent(error):
                raise
            return None

    @_explained
    def read(self, name: str) -> bytes:
        """Read a whole object."""
        # with a range, for without one s3fs asks for the size first: two requests for each record
        data = self._range(name, 0, MOST_WHOLE + 1)
        if len(data) > MOST_WHOLE:
            raise StorageError(f"more than {MOST_WHOLE:,} bytes are too many", where=self.place(name), todo=TOO_LARGE)
        return data

    @_explained
    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges of an object; near ones share a request."""
        parts: dict[tuple[int, int], bytes] = {}
        for group in near_ranges(ranges):
            start, stop = group[0][0], max(offset + size for offset, size in group)
            data = self._range(name, start, stop)
            parts |= {(offset, size): data[offset - start : offset - start + size] for offset, size in group}
        return [parts[offset, size] for offset, size in ranges]

    def _range(self, name: str, start: int, stop: int | None) -> bytes:
        try:
            return bytes(self.fs.cat_file(self._path(name), start=start, end=stop))
        except OSError as error:
            if _code(error) in ("InvalidRange", "416"):
                return b""  # the object ends before the range begins
            raise

    @_explained
    def names(self, folder: str) -> list[str]:
        """List all objects below a folder."""
        found = self.fs.find(self._path(folder) if folder else self.root)
        below = self.root.lstrip("/") + "/"
        names = [str(path).lstrip("/").removeprefix(below) for path in found]
        return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))

    @_explained
    def entries(self, folder: str = "") -> list[str]:
        """List the names directly below a folder."""
        place = self._path(folder) if folder else self.root
        try:
            found = [str(path).rstrip("/").rpartition("/")[2] for path in self.fs.ls(place, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if name and not name.startswith("."))

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Give a path on the local temporary disk (TMPDIR)."""
        with temporary_file() as path:
            try:
                yield path
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                what = "the disk for temporary files is full: a unit is prepared there before it is uploaded"
                todo = f"make room there, or set TMPDIR to a larger disk; {GO_ON}"
                raise StorageError(what, where=str(path.parent), todo=todo) from error

    @_explained
    def put(self, draft: Path, name: str) -> None:
        """Upload a draft."""
        self.fs.put_file(str(draft), self._path(name))

    @_explained
    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it exists, as far as the store keeps such a condition."""
        for attempt in range(1, CREATE_ATTEMPTS + 1):
            if self.size(name) is not None:
                return False
            try:
                self._create(self._path(name), data)
            except FileExistsError:
                return False
            except Exception as error:
                if _refused(error):
                    return False
                if _code(error) != "ConditionalRequestConflict" or attempt == CREATE_ATTEMPTS:
                    raise
                time.sleep(0.1 * 2**attempt)
            else:
                return True
        raise AssertionError("the last attempt returns or raises")

    def _create(self, path: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(path, data, mode="create")
        except TypeError:  # a file system that does not know of `mode`, and so keeps no condition
            self.fs.pipe_file(path, data)

    @_explained
    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        try:
            self.fs.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def drop_copy(self, name: str) -> bool:
        """Say that nothing is kept beside the objects themselves."""
        return False

    def changed_after(self, name: str, folder: str) -> bool | None:
        """Say that nobody knows: an object store has no folders."""
        return None

    def free(self) -> int | None:
        """Say that nobody knows."""
        return None

    @_explained
    def require_conditional_create(self) -> None:
        """Raise TecCacheError unless the store refuses to create what exists: several writers need that."""
        name = f".probe-{uuid.uuid4().hex[:12]}"
        refused = False
        try:
            self._create(self._path(name), b"1")
            try:
                self._create(self._path(name), b"2")
            except Exception as error:
                if not (isinstance(error, FileExistsError) or _refused(error)):
                    raise
                refused = self.read(name) == b"1"
        finally:
            self.remove(name)
        if not refused:
            raise TecCacheError(
                "this store has no conditional create, so several writers could overwrite each other's records",
                where=self.url,
                todo="extract with one process, or into folders that tec-cache merge joins",
            )


def _refused(error: Exception) -> bool:
    """Say whether a store refused to create what exists; not every fsspec says so with FileExistsError."""
    return _code(error) in ("PreconditionFailed", "412") or "PreconditionFailed" in str(error)


def near_ranges(ranges: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Group (offset, bytes) ranges that lie within GAP of each other, in order of offset."""
    groups: list[list[tuple[int, int]]] = []
    end = 0
    for offset, size in sorted(ranges):
        if groups and offset - end <= GAP:
            groups[-1].append((offset, size))
            end = max(end, offset + size)
        else:
            groups.append([(offset, size)])
            end = offset + size
    return groups
