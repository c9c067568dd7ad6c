"""What fsspec makes of a web server that refuses: it calls whatever goes wrong with a file a file that is not there."""

from __future__ import annotations

GONE = (404, 410)
"""The only answers that say that there is no such file."""


def refusal_behind(error: FileNotFoundError) -> Exception | None:
    """Return what a web server or the way to it refused; None where the file is not there indeed."""
    cause = error.__cause__
    of_the_web = type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)
    if isinstance(cause, Exception) and of_the_web and getattr(cause, "status", None) not in GONE:
        return cause
    return None
