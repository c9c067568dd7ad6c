"""Paths as people write them, and as libraries take them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tec_cache.errors import ConfigError

_FILE_URL = "file://"


def expanded(path: str) -> str:
    """Return a path with a leading `~` or `~name` replaced by that home folder, which no shell does after `=`.

    What is no local path, a name or another URL, comes back as it is. Raises ConfigError where there is no such home
    folder, or the path cannot be one.
    """
    if "\0" in path:
        raise ConfigError(f"{path!r} is no path: it holds a zero byte", todo="give a path without it")
    scheme = _FILE_URL if path.startswith(_FILE_URL) else ""
    rest = path.removeprefix(scheme)
    if not rest.startswith("~"):
        return path
    home = os.path.expanduser(rest)
    if home.startswith("~"):
        todo = f"give the path itself; ./{rest} is what has that very name"
        raise ConfigError(f"there is no home folder {rest.partition('/')[0]}", where=path, todo=todo)
    return scheme + home


def exact_name(name: str) -> str:
    """Return the file name that `plain_text` made encodable: \\udcff and the like become bytes again."""
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), name)


@contextmanager
def encodable(path: Path) -> Iterator[str]:
    """Give a name of a file or folder to a library that takes UTF-8 only: its own, else that of a temporary link."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="tec-cache-") as folder:
            link = Path(folder) / "link"
            link.symlink_to(path.absolute())
            yield str(link)
    else:
        yield str(path)
