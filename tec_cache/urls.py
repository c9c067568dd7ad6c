"""What of a URL may be shown and stored: everything but the credentials in it.

A URL carries credentials in two places: before its host (`https://USER:PASSWORD@host/...`) and in its query
(`?X-Amz-Signature=...`). Whatever prints a URL, or writes one to a disk, passes it through here first.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

_SCHEME = r"(?:[A-Za-z][A-Za-z0-9+.-]*|\})://"
"""A brace may end a scheme: {http,https}://host."""

_NEXT = rf"(?:[{{,(]|::){_SCHEME}"
"""Where another URL begins: in braces, or in a chain."""

_WHOLE = re.compile(rf"({_SCHEME})((?:(?!{_NEXT}).)*)", re.DOTALL)
_WITHIN = re.compile(rf"({_SCHEME})((?:(?!{_NEXT})[^\s'\"<>])*)")

_QUERY = re.compile(r"\?[\w.%~-]+=")
"""How a query begins where a question mark may be a pattern as well, as in s3://bucket/shard-0?.tar."""

WEB = frozenset({"http", "https", "dav", "davs", "webdav", "webdavs", "webhdfs", "}"})
"""Schemes in which every question mark begins the query."""

_NO_USER = frozenset({"abfs", "abfss", "az", "wasb", "wasbs", "github", "git"})
"""Schemes in which something else stands before an @: a container, a repository."""

_FEWEST = 6
"""Letters of a password that is looked for by itself: a shorter one is part of too many words."""


class Parts(NamedTuple):
    """A URL taken apart; `user` and `query` are what nobody may see."""

    scheme: str
    user: str
    place: str
    query: str


def split_url(scheme: str, rest: str) -> Parts:
    """Take a URL apart: its scheme, and what follows `://`."""
    name, user = scheme.lower(), ""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if name not in _NO_USER:
        # a secret with an unquoted slash in it, as Amazon's have them, ends the host too early: KEY:SEC/RET@bucket
        port = re.sub(r"^\[[^\]]*\]", "", host).rpartition(":")[2]
        cut_off = ":" in host and not port.isdigit() and not host.startswith("arn:")
        if "@" in host or (cut_off and "@" in rest):
            at = host.rindex("@") if "@" in host else rest.rindex("@")
            user, rest = rest[:at], rest[at + 1 :]
    if name in WEB:
        place, _, query = rest.partition("?")
    else:
        match = _QUERY.search(rest)
        place, query = (rest[: match.start()], rest[match.start() + 1 :]) if match else (rest, "")
    return Parts(scheme, user, place, query)


def without_secrets(text: str, mark: str = "") -> str:
    """Return a path, a URL, a pattern or a chain of URLs without users, passwords and queries.

    mark: what stands for them, so that a reader sees that something is left out.

    >>> without_secrets("simplecache::https://me:word@host/a.tar?signature=0123")
    'simplecache::https://host/a.tar'
    """
    return _WHOLE.sub(lambda match: _shown(match, mark), text) if "://" in text else text


def scrubbed(text: str, *urls: str) -> str:
    """Return a message of any origin without the credentials of the URLs in it, and of `urls` in any form."""
    secrets = {secret for url in urls for secret in secrets_in(url)}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _WITHIN.sub(lambda match: _shown(match, ""), text) if "://" in text else text


def secrets_in(url: str) -> set[str]:
    """Return the credentials of a URL, each as it stands there, quoted and unquoted."""
    found: set[str] = set()
    for match in _WHOLE.finditer(url):
        parts = split_url(match[1][:-3], match[2])
        values = [value.partition("=")[2] for value in parts.query.split("&")]
        words = [parts.query, parts.user.partition(":")[2], *values]
        found |= {word for word in words if len(word) >= _FEWEST} | {parts.user}
    found.discard("")
    return found | {unquote(text) for text in found} | {quote(text) for text in found}


def _shown(match: re.Match[str], mark: str) -> str:
    parts = split_url(match[1][:-3], match[2])
    user = f"{mark}@" if parts.user and mark else ""
    query = f"?{mark}" if parts.query and mark else ""
    return f"{match[1]}{user}{parts.place}{query}"


UNUSED_USER = "credentials in this kind of URL reach nobody"
"""What is said where `user_unused`."""

UNUSED_USER_TODO = (
    "leave them out of the URL, and give them as its file system wants them "
    "(for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials)"
)


def user_unused(url: str, path: str) -> bool:
    """Say whether a file system took the credentials of a URL for a part of the path, as s3fs and gcsfs do."""
    scheme, _, rest = url.partition("://")
    parts = split_url(scheme, rest)
    return bool(parts.user) and scheme.lower() not in WEB and parts.user in path
