"""From a URL, or a chain of them, to the file system of fsspec's that reads it, and to the files that it names."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import fsspec

from tec_cache.data.remote_files import RemoteFile, WebFile
from tec_cache.errors import ConfigError, SourceError
from tec_cache.urls import UNUSED_USER, UNUSED_USER_TODO, split_url, user_unused, without_secrets

SILENT_SECONDS = 300.0
"""How long a web server may be silent. A whole file has no bound: a large one takes as long as it takes."""

HTTP = ("http", "https")


@dataclass(frozen=True)
class Place:
    """A path or pattern of one file system."""

    fs: Any
    path: str
    shown: str
    """The URL without credentials."""
    query: str = ""
    """Of a URL of the web: it goes with every request, and is part of no name."""
    chain: str = ""
    """What stands before the URL: `simplecache::`."""
    archive: str = ""
    """What stands behind it: `::https://host/photos.zip`."""
    outer: tuple[str, ...] = ()
    """Parts of the archive's path."""

    @property
    def web(self) -> bool:
        """Whether a web server is asked, at the end of the chain."""
        return self.path.partition("://")[0] in HTTP

    def files(self) -> Iterator[RemoteFile]:
        """Return the file that the path names where it exists, else the files that it matches as a pattern."""
        magic = "*[" if self.web else "*?["
        if not any(letter in self.path for letter in magic) or self.fs.isfile(self._address(self.path)):
            yield self._file(self.path, self.shown)
            return
        hidden = self.path.rpartition("/")[2].startswith(".")
        pattern = literal_as_far_as_there(self.path, magic, self.fs.exists)
        for path, info in sorted(self.fs.glob(pattern, detail=True).items()):
            if hidden or not path.rpartition("/")[2].startswith("."):
                url = without_secrets(path if self.web else self.fs.unstrip_protocol(path))
                shown = f"{self.chain}{url}{self.archive}"
                size = info.get("size") if info.get("type") == "file" else None
                yield self._file(path, shown, size)

    def _file(self, path: str, shown: str, size: int | None = None) -> RemoteFile:
        place = path if self.archive else shown.rpartition("://")[2]
        parts = [part for part in place.split("/") if part]
        if self.web:  # as the server's disk has it, where that is one name
            parts = [name if "/" not in (name := unquote(part)) else part for part in parts]
        kind = WebFile if self.web and not self.chain else RemoteFile
        return kind(self.fs, self._address(path), shown, (*self.outer, *parts), size)

    def _address(self, path: str) -> str:
        return f"{path}?{self.query}" if self.query else path


def connect(url: str) -> Place:
    """Return the place of a URL.

    Raises SourceError for a chain that is not read, ConfigError for credentials that would not be used.
    """
    head, chained, rest = url.partition("::")
    scheme, slashes, member = head.partition("://")
    if chained and head == "simplecache":
        inner = connect(rest)
        fs = fsspec.filesystem("simplecache", fs=inner.fs)
        return replace(inner, fs=fs, shown=f"{head}::{inner.shown}", chain=f"{head}::{inner.chain}")
    if chained and scheme == "zip" and slashes:
        archive = _archive(rest)
        fs = fsspec.filesystem("zip", fo=fsspec.core.OpenFile(archive.fs, archive.address))
        tail = f"::{archive.where}"
        return Place(fs, member, head + tail, archive=tail, outer=archive.parts)
    if scheme in HTTP and slashes:
        return _web(url)
    if chained:
        before = scheme if slashes else head
        raise SourceError(
            f"{before!r} cannot stand before `::`, which chains file systems and separates nothing",
            where=without_secrets(url),
            todo="chain with simplecache:: or zip://MEMBER::, and give several shards in braces: '{a,b}.tar' "
            "(filecache and blockcache would write the URL, and any credentials in it, to a disk)",
        )
    fs, path = fsspec.core.url_to_fs(url)
    if user_unused(url, path):
        raise ConfigError(UNUSED_USER, where=without_secrets(url), todo=UNUSED_USER_TODO)
    return Place(fs, path, without_secrets(url))


def _web(url: str) -> Place:
    """Return the place of an http(s) URL; `::` in it is part of an address, as in http://[::1]/."""
    import aiohttp

    scheme, _, rest = url.partition("://")
    parts = split_url(scheme, rest)
    user = f"{parts.user}@" if parts.user else ""
    # what a browser does with the part behind # has no meaning here, and names have it
    path = f"{scheme}://{user}{parts.place.replace('#', '%23')}"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=60.0, sock_read=SILENT_SECONDS)
    # the bytes as they lie on the server: a .tar.gz that it calls gzip-encoded would come unpacked
    client = {"timeout": timeout, "auto_decompress": False}
    fs = fsspec.filesystem(scheme, headers={"Accept-Encoding": "identity"}, client_kwargs=client)
    return Place(fs, path, without_secrets(url), parts.query)


def _archive(url: str) -> RemoteFile:
    """Return the archive in which a chain goes on. Raises SourceError unless the URL names one file."""
    files = list(connect(url).files())
    try:
        if len(files) == 1 and files[0].size():
            return files[0]
    except FileNotFoundError:
        files = []
    what = f"one archive is wanted behind `::`, this names {len(files) or 'none'}"
    raise SourceError(what, where=without_secrets(url), todo="check the name; braces may list several")


def literal_as_far_as_there(path: str, magic: str, there: Callable[[str], bool]) -> str:
    """Escape the folders of a pattern that exist as they are written, up to the first that does not."""
    parts = path.split("/")
    for i, part in enumerate(parts[:-1]):
        if any(letter in part for letter in magic):
            if not there("/".join(parts[: i + 1])):
                break
            parts[i] = glob.escape(part)
    return "/".join(parts)
