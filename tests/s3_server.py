"""An S3 server for tests, in a process of its own, with a log of the requests that reached it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from s3fs import S3FileSystem

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    # a server that does not answer is to be noticed soon
    "AWS_MAX_ATTEMPTS": "1",
}

_LINE = re.compile(r"\"(?:\x1b\[[0-9;]*m)*([A-Z]+) (\S+) HTTP")


class Request(NamedTuple):
    """One line of the server's log."""

    method: str
    path: str


class S3Server:
    """Address, log and control of a running server."""

    def __init__(self, address: str, log: Path) -> None:
        self.address, self.log = address, log
        self.environment = ENVIRONMENT | {"AWS_ENDPOINT_URL": address}

    @contextmanager
    def requests(self) -> Iterator[list[Request]]:
        """Fill a list with the requests that arrive within the block."""
        before, found = self.log.stat().st_size, []
        yield found
        text = self.log.read_bytes()[before:].decode()
        found += [Request(*match.groups()) for match in map(_LINE.search, text.splitlines()) if match]

    def create_bucket(self, name: str) -> None:
        """Create a bucket."""
        self._send("PUT", f"/{name}")

    def check_credentials(self, check: bool) -> None:
        """Refuse keys that no account has, or take any."""
        self._send("POST", "/moto-api/reset-auth", b"0" if check else b"inf")

    def _send(self, method: str, path: str, data: bytes = b"") -> None:
        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(self.address + path, data=data, method=method, headers=headers)
        urllib.request.urlopen(request, timeout=30).close()


def closed_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run a server until the end of the block, on a port that it chooses: no other may be given the same one."""
    log = folder / "s3.log"
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | ENVIRONMENT)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the S3 server did not start: {log.read_text()}")
            if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text()):
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"the S3 server did not say where it listens: {log.read_text()}")
        S3FileSystem.clear_instance_cache()  # what it has made for an earlier server would ask that one
        yield S3Server(found[1], log)
    finally:
        S3FileSystem.clear_instance_cache()
        process.send_signal(signal.SIGKILL)
        process.wait()
