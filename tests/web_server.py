"""A web server for tests: files of a folder, with or without parts of a file, behind a signature or a password."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit


class Asked(NamedTuple):
    """A request, and how many bytes of a file it got."""

    method: str
    name: str
    query: str
    size: int


@dataclass
class WebServer:
    """What a running server does; may be changed at any time."""

    root: Path
    ranges: bool = True
    """Whether it gives parts of a file; if not, it sends the whole one without a word, as Python's own server does."""
    length: bool = True
    """Whether it says how large a file is."""
    head: bool = True
    """Whether it answers HEAD: links that are signed for GET do not."""
    signature: str = ""
    """What `sig=` in the query must be, where anything."""
    password: str = ""
    """USER:PASSWORD that it wants, where any."""
    broken: set[str] = field(default_factory=set)
    """Files that it says 500 for."""
    asked: list[Asked] = field(default_factory=list)
    address: str = ""

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"

    def with_user(self, user: str, name: str) -> str:
        return f"{self.address.replace('://', f'://{user}@')}/{name}"


@contextmanager
def web_server(root: Path) -> Iterator[WebServer]:
    """Run a server in a thread until the end of the block."""
    server = WebServer(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self) -> None:
            url = urlsplit(self.path)
            name = unquote(url.path).lstrip("/")
            status, data, headers = self._found(name, url.query)
            if server.length:
                headers["Content-Length"] = str(len(data))
            else:
                headers["Transfer-Encoding"] = "chunked"
            server.asked.append(Asked(self.command, name, url.query, len(data) if self.command == "GET" else 0))
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                try:
                    self._send(data)
                except OSError:
                    self.close_connection = True  # the other side has had enough

        def _send(self, data: bytes) -> None:
            if server.length:
                self.wfile.write(data)
                return
            for start in range(0, len(data), 1 << 16):
                piece = data[start : start + (1 << 16)]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")

        def _found(self, name: str, query: str) -> tuple[int, bytes, dict[str, str]]:
            given = self.headers.get("Authorization", "").removeprefix("Basic ")
            if server.password and base64.b64decode(given).decode() != server.password:
                return 401, b"who are you?", {}
            path = server.root / name
            if path.is_dir():
                names = sorted(quote(item.name) + "/" * item.is_dir() for item in path.iterdir())
                links = "".join(f'<a href="{name}">x</a>' for name in names)
                return 200, links.encode(), {"Content-Type": "text/html"}
            if server.signature and parse_qs(query).get("sig") != [server.signature]:
                return 403, b"the signature has expired", {}
            if self.command == "HEAD" and not server.head:
                return 403, b"", {}
            if name in server.broken:
                return 500, b"", {}
            if not path.is_file():
                return 404, b"", {}
            data = path.read_bytes()
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if part is None or not server.ranges:
                return 200, data, {}
            start, end = int(part[1]), min(int(part[2]) + 1, len(data))
            return 206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            pass  # a connection that was closed early

    with Server(("127.0.0.1", 0), Handler) as running:
        server.address = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            running.shutdown()
            thread.join()
