"""A store with its payloads copied whole to a local disk on first use: a bounded folder between network and training.

Names of payloads hold their hash, so the folder may be shared by the processes of a node and by other runs. What a
run has used stays until it ends: in an order that comes back every epoch, whatever made room now would be missed
next. What does not fit is read straight from the store.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO

from tec_cache.cache.layout import digits_of
from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.store.local import read_local
from tec_cache.store.stage_folder import StageFolder
from tec_cache.store.store import Store

FREE_SHARE = 0.9
"""Share of the free disk that copies may take where no bound was given."""

PIECE = 64 << 20
"""Bytes of a payload that are copied at a time: most payloads in one request, and none whole in memory."""

MOST_COPIES = 2
"""A file whose copy is damaged so often is read from the store: the disk cannot be trusted with it."""


class StagedStore:
    """`inner`, with copies of its payloads in `folder`: at most `most_bytes` of them, or what the disk has."""

    def __init__(self, inner: Store, folder: Path, most_bytes: int | None = None) -> None:
        self.inner, self.url, self.address, self.folder = inner, inner.url, inner.address, inner.folder
        self.stage = StageFolder(folder, most_bytes or 0)
        try:
            held = self.stage.open()
            if most_bytes is None:
                self.stage.most_bytes = held + int(shutil.disk_usage(folder).free * FREE_SHARE)
        except OSError as error:
            what, todo = f"payloads cannot be staged here: {error.strerror}", "name another --stage folder"
            raise ConfigError(what, where=str(folder), todo=todo) from error
        self._direct: set[str] = set()
        self._damaged: Counter[str] = Counter()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges of a payload's copy, made if there is none yet, or of the file where it cannot have one."""
        short = name.rpartition("/")[2]
        while name not in self._direct and digits_of(short) is not None:
            try:
                self.stage.touch(short)
                return read_local(self.stage.folder / short, ranges)
            except FileNotFoundError:  # not there yet, or no longer: another run made room
                self._add(name, short)
            except OSError:
                self._direct.add(name)  # the copies' disk fails; the store is as good
        return self.inner.read_ranges(name, ranges)

    def drop_copy(self, name: str) -> bool:
        """Drop a copy whose content was found damaged; say whether reading again gives other bytes."""
        short = name.rpartition("/")[2]
        with self._locks[name]:
            if name in self._direct or digits_of(short) is None:
                return False
            self._damaged[name] += 1
            if self._damaged[name] >= MOST_COPIES:
                self._direct.add(name)
            with suppress(OSError):
                self.stage.drop(short)
            return True

    def _add(self, name: str, short: str) -> None:
        """Copy a payload here, or see to it that it is read from the store."""
        with self._locks[name]:
            try:
                size = self.inner.size(name)
                if size is None:
                    raise FileNotFoundError(name)
                there = self.stage.add(short, size, lambda stream: self._copy(name, short, size, stream))
            except TecCacheError:
                raise
            except OSError:
                there = False  # the disk is full before the bound, or the file is gone: reading it will tell
            if not there:
                self._direct.add(name)

    def _copy(self, name: str, short: str, size: int, stream: IO[bytes]) -> bool:
        """Copy a payload and compare it with its name; False where it is damaged in the store itself."""
        digits = str(digits_of(short))
        for _ in range(MOST_COPIES):
            digest = hashlib.sha256()
            stream.seek(0)
            for offset in range(0, size, PIECE):
                (data,) = self.inner.read_ranges(name, [(offset, min(PIECE, size - offset))])
                digest.update(data)
                stream.write(data)
            if digest.hexdigest().startswith(digits):
                return True
        return False  # the checksums of its blocks decide which of them can be used

    def place(self, name: str) -> str:
        """Return where the file itself lies, not its copy."""
        return self.inner.place(name)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None where there is none."""
        return self.inner.size(name)

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        return self.inner.read(name)

    def names(self, folder: str) -> list[str]:
        """List all files below a folder."""
        return self.inner.names(folder)

    def entries(self, folder: str = "") -> list[str]:
        """List what lies in a folder itself."""
        return self.inner.entries(folder)

    def draft(self) -> AbstractContextManager[Path]:
        """Give a local path to be filled with a payload."""
        return self.inner.draft()

    def put(self, draft: Path, name: str) -> None:
        """Give a finished draft its name."""
        self.inner.put(draft, name)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists."""
        return self.inner.create(name, data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self.inner.remove(name)

    def require_conditional_create(self) -> None:
        """Raise TecCacheError unless `create` lets one of several writers win."""
        self.inner.require_conditional_create()

    def changed_after(self, name: str, folder: str) -> bool | None:
        """Say whether the files of a folder changed since a file was written."""
        return self.inner.changed_after(name, folder)

    def free(self) -> int | None:
        """Return the free bytes of the store itself."""
        return self.inner.free()
