"""A stand-in of the hub of models: the part of its interface by which huggingface_hub makes a model and commits files.

Large files go by git-lfs's way (HF_HUB_DISABLE_XET=1): asked for by hash, put, then named in the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a-token-of-the-stand-in"
OWNER = "somebody"


@dataclass
class Hub:
    """What lies on the hub."""

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Name -> files."""
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that were put, by their SHA-256."""
    commits: list[list[str]] = field(default_factory=list)
    """Files of each commit."""
    address: str = ""


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run the stand-in in a thread until the end of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, value: Any, code: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if code >= 400:
                self.send_header("X-Error-Message", value["error"])
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_PUT(self) -> None:
            data = self.body()
            hub.objects[hashlib.sha256(data).hexdigest()] = data
            self.answer({})

        def do_POST(self) -> None:
            body = self.body()
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid username or password."}, 401)
            if self.path == "/api/repos/create":
                return self.create(json.loads(body))
            if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
                files = json.loads(body)["files"]
                large = (".safetensors", ".pth")
                modes = {f["path"]: "lfs" if f["path"].endswith(large) else "regular" for f in files}
                about = {"shouldIgnore": False, "oid": None}
                return self.answer({"files": [about | {"path": p, "uploadMode": m} for p, m in modes.items()]})
            if self.path.endswith(".git/info/lfs/objects/batch"):
                wanted = json.loads(body)["objects"]
                put = {o["oid"]: {"upload": {"href": f"{hub.address}/put/{o['oid']}"}} for o in wanted}
                return self.answer({"transfer": "basic", "objects": [o | {"actions": put[o["oid"]]} for o in wanted]})
            if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
                return self.commit(match[1], [json.loads(line) for line in body.splitlines()])
            return self.answer({"error": f"not in the stand-in: {self.path}"}, 404)

        def create(self, asked: dict[str, Any]) -> None:
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            if not name.startswith(f"{OWNER}/"):
                return self.answer({"error": "You don't have the rights to create a model there"}, 403)
            known = name in hub.models
            hub.models.setdefault(name, {})
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.private.setdefault(name, bool(private))
            return self.answer({"url": f"{hub.address}/{name}", "error": "exists"}, 409 if known else 200)

        def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
            files = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            hub.models[name] |= files
            hub.commits.append(sorted(files))
            oid = hashlib.sha1(str(len(hub.commits)).encode()).hexdigest()
            return self.answer({"success": True, "commitUrl": f"{hub.address}/{name}/commit/{oid}", "commitOid": oid})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
