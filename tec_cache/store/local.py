"""A cache in a local or mounted folder: temporary name, sync, rename."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tec_cache.store.files import make_folder, sync_file, sync_folder, write_durably

DRAFTS = ".drafts"
"""Folder of unfinished files; whatever a killed job leaves is here, or is a payload that no record names."""


class LocalStore:
    """Files below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = self.address = str(root)
        self.folder: Path | None = root

    def place(self, name: str) -> str:
        """Return the file's path."""
        return str(self.root / name)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None where there is none."""
        try:
            return os.stat(self.root / name).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        return (self.root / name).read_bytes()

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges of a file with one `pread` each."""
        return read_local(self.root / name, ranges)

    def names(self, folder: str) -> list[str]:
        """List all files below a folder."""
        found = []
        for path, folders, files in os.walk(self.root / folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(path).relative_to(self.root).as_posix()
            found += [f"{below}/{name}".removeprefix("./") for name in files if not name.startswith(".")]
        return sorted(found)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Give a path on the same disk, so that naming the file is a rename."""
        path = make_folder(self.root / DRAFTS) / uuid.uuid4().hex
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def put(self, draft: Path, name: str) -> None:
        """Sync a draft, rename it, sync its new folder."""
        final = self.root / name
        make_folder(final.parent)
        sync_file(draft)
        os.replace(draft, final)
        sync_folder(final.parent)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists, by a hard link, which fails where the name is taken."""
        path, drafts = self.root / name, self.root / DRAFTS
        return write_durably(path, lambda stream: stream.write(data), once=True, drafts=drafts)

    def remove(self, name: str) -> None:
        """Remove a file, and its folder where that is empty then."""
        path = self.root / name
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
        """Remove what killed jobs left unfinished; only while no other job writes."""
        shutil.rmtree(self.root / DRAFTS, ignore_errors=True)

    def require_conditional_create(self) -> None:
        """Nothing to check: a hard link fails where its name is taken."""

    def free(self) -> int | None:
        """Return the free bytes of the disk."""
        root = self.root.absolute()
        return shutil.disk_usage(next(p for p in [root, *root.parents] if p.exists())).free


def read_local(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read (offset, bytes) ranges of a local file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return [os.pread(handle, size, offset) for offset, size in ranges]
    finally:
        os.close(handle)
