"""A cache in a local or mounted folder: temporary name, sync, rename.

Reading follows symbolic links, so that a cache may be put together from several disks. Nothing is written, replaced
or removed through a link that leads out of the cache: whoever made the cache could have set it to any folder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tec_cache.cache.layout import DRAFTS, SCRATCH
from tec_cache.errors import CacheError
from tec_cache.store.files import drafts_of, make_folder, sync_file, sync_folder, write_durably
from tec_cache.store.names import checked_name
from tec_cache.store.store import MOST_WHOLE

_DRAFT = re.compile(rf"[0-9a-f]{{12,32}}|{drafts_of('.+').pattern}")
_SCRATCH = re.compile(re.escape(SCRATCH) + "[0-9a-f]{12}")


class LocalStore:
    """Files below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = self.address = str(root)
        self.folder: Path | None = root

    def place(self, name: str) -> str:
        """Return the file's path."""
        return str(self.root / name)

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name, self.url)

    def _path_to_change(self, name: str) -> Path:
        """Return the path of a file that is to be written or removed. Raises CacheError where links lead elsewhere."""
        path = self._path(name)
        root, folder = (os.path.realpath(place) for place in (self.root, path.parent))
        if os.path.commonpath([root, folder]) != root:
            what = f"a symbolic link leads out of the cache, to {folder}"
            todo = "put a real folder in its place (a mounted one will do), or name the cache by its real path"
            raise CacheError(what, where=str(path.parent), todo=todo)
        return path

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None where there is none."""
        try:
            return os.stat(self._path(name)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        return read_regular(self._path(name), MOST_WHOLE)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges of a file with one `pread` each."""
        return read_local(self._path(name), ranges)

    def names(self, folder: str) -> list[str]:
        """List all files below a folder."""
        found = []
        for path, folders, files in os.walk(self._path(folder) if folder else self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(path).relative_to(self.root).as_posix()
            found += [f"{below}/{name}".removeprefix("./") for name in files if not name.startswith(".")]
        return sorted(found)

    def entries(self, folder: str = "") -> list[str]:
        """List what lies in a folder itself."""
        try:
            names = os.listdir(self._path(folder) if folder else self.root)
            return sorted(name for name in names if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Give a path on the same disk, so that naming the file is a rename."""
        name = uuid.uuid4().hex
        path = self._path_to_change(f"{DRAFTS}/{name}")
        make_folder(path.parent)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def put(self, draft: Path, name: str) -> None:
        """Sync a draft, rename it, sync its new folder."""
        final = self._path_to_change(name)
        make_folder(final.parent)
        sync_file(draft)
        os.replace(draft, final)
        sync_folder(final.parent)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists, by a hard link, which fails where the name is taken."""
        path, drafts = self._path_to_change(name), self._path_to_change(f"{DRAFTS}/draft").parent
        return write_durably(path, lambda stream: stream.write(data), once=True, drafts=drafts)

    def remove(self, name: str) -> None:
        """Remove a file, and its folder where that is empty then."""
        path = self._path_to_change(name)
        path.unlink(missing_ok=True)
        for folder in path.relative_to(self.root).parents:
            try:
                os.rmdir(self.root / folder)
            except OSError:  # not empty
                break

    def drop_copy(self, name: str) -> bool:
        """Say that nothing is kept beside the files themselves."""
        return False

    def clear_drafts(self) -> None:
        """Remove what killed jobs left unfinished, by its names; only while no other job writes."""
        drafts = self._path_to_change(f"{DRAFTS}/draft").parent
        for entry in os.scandir(drafts) if drafts.is_dir() else ():
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    if _SCRATCH.fullmatch(entry.name):
                        shutil.rmtree(entry.path)
                elif _DRAFT.fullmatch(entry.name):
                    os.unlink(entry.path)
        with suppress(OSError):  # there is none, or something else is in it
            drafts.rmdir()

    def require_conditional_create(self) -> None:
        """Nothing to check: a hard link fails where its name is taken."""

    def changed_after(self, name: str, folder: str) -> bool | None:
        """Compare the times of the folders with that of the file."""
        written, above = os.stat(self._path(name)).st_mtime_ns, self._path(folder)
        try:
            below = [entry.stat().st_mtime_ns for entry in os.scandir(above) if entry.is_dir()]
            return max(os.stat(above).st_mtime_ns, *below, 0) >= written
        except (FileNotFoundError, NotADirectoryError):
            return True

    def free(self) -> int | None:
        """Return the free bytes of the disk."""
        root = self.root.absolute()
        return shutil.disk_usage(next(p for p in [root, *root.parents] if p.exists())).free


def read_local(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read (offset, bytes) ranges of a local file; a range beyond the end comes back short."""
    handle, length = _open_regular(path)
    try:
        # `pread` allocates what it is asked for before it reads
        return [os.pread(handle, max(0, min(size, length - offset)), offset) for offset, size in ranges]
    finally:
        os.close(handle)


def read_regular(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes. Raises OSError, EFBIG where it is larger, without reading it."""
    handle, length = _open_regular(path)
    with open(handle, "rb") as stream:
        # one byte more, in case it grows; no more, for that much memory is taken at once
        data = b"" if length > most else stream.read(length + 1)
        while 0 < length < len(data) <= most and (rest := stream.read(most + 1 - len(data))):
            data += rest
    size = max(length, len(data))
    if size > most:
        raise OSError(errno.EFBIG, f"{size:,} bytes are too many, at most {most:,} are read", str(path))
    return data


def _open_regular(path: Path) -> tuple[int, int]:
    """Open a file for reading; return its handle and bytes. Raises OSError for a pipe or a device, without waiting."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return handle, status.st_size
