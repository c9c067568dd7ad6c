"""Paths as people write them."""

from __future__ import annotations

import os

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
