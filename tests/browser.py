"""A headless browser, told what to do through two pipes: pages at a width, what went wrong in them, and screenshots."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_LOOK = """(() => ({
    width: document.scrollingElement.scrollWidth, inner: innerWidth, title: document.title,
    images: document.images.length,
    broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    silent: [...document.images].filter(image => !image.alt).map(image => image.src),
    headings: document.querySelectorAll('h1').length,
}))()"""


class Browser:
    """One page of a running browser."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._buffer, self._number = to, back, b"", 0
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def look(self, page: Path, width: int, height: int = 900) -> dict[str, Any]:
        """Load a page; return what it is like: see _LOOK, and `errors` and `fetched` from elsewhere than the disk."""
        device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **device)
        self._events.clear()
        self._call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())
        found: dict[str, Any] = self._call("Runtime.evaluate", expression=_LOOK, returnByValue=True)["result"]["value"]
        errors, fetched = [], []
        for event in self._events:
            told, method = event["params"], event["method"]
            logged = method == "Log.entryAdded" and told["entry"]["level"] == "error"
            printed = method == "Runtime.consoleAPICalled" and told["type"] == "error"
            if logged or printed or method in ("Runtime.exceptionThrown", "Network.loadingFailed"):
                errors.append(str(told)[:300])
            elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("file:", "data:")):
                fetched.append(told["request"]["url"])
        return {**found, "errors": errors, "fetched": fetched}

    def screenshot(self, file: Path) -> None:
        """Write what is seen of the page as a PNG."""
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": number, "method": method, "params": params, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self._events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._back, 1 << 16)
            assert piece, "the browser is gone"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Run a browser until the end of the block; folder: for its profile."""
    assert BROWSER is not None
    (its_in, to), (back, its_out) = os.pipe(), os.pipe()
    # it reads from 3 and writes to 4, which may be any of these four
    its_in, its_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (its_in, its_out))
    words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    move = f'exec 3<&{its_in} 4>&{its_out}; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", move, "bash", *words, f"--user-data-dir={folder}"],
        pass_fds=(its_in, its_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for end in (its_in, its_out):
        os.close(end)
    try:
        yield Browser(to, back)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)
