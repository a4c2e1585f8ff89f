"""A stand-in for the Hugging Face Hub on this machine: the calls that an upload makes, and what they have brought."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """repos: name -> whether it is private. files: path -> content, of all commits. blobs: SHA-256 -> content.
    commits: the messages. tokens: what was sent. is_down: answers 500 to commits."""

    url: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    is_down: bool = False


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._handle(b"")

        def do_POST(self) -> None:
            self._handle(self._body())

        def do_PUT(self) -> None:
            self._handle(self._body())

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _handle(self, body: bytes) -> None:
            hub.calls.append(f"{self.command} {self.path}")
            if authorization := self.headers.get("Authorization"):
                hub.tokens.add(authorization.removeprefix("Bearer "))
            status, answer = _answer(hub, self.command, self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(hub: Hub, method: str, path: str, body: bytes) -> tuple[int, Any]:
    path = path.partition("?")[0]
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        hub.repos[name] = asked.get("private") is True or asked.get("visibility") == "private"
        return 200, {"url": f"{hub.url}/{name}", "name": name}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if "/preupload/" in path:
        files = json.loads(body)["files"]
        large = (".safetensors", ".model", ".sig")
        return 200, {
            "files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                 "shouldIgnore": False}
                for f in files
            ]
        }  # fmt: skip
    if path.endswith("/info/lfs/objects/batch"):
        return 200, {
            "transfer": "basic",
            "objects": [
                {**o, "actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ],
        }
    if path.startswith("/blob/") and method == "PUT":
        hub.blobs[path.removeprefix("/blob/")] = body
        return 200, {}
    if "/commit/" in path:
        if hub.is_down:
            return 500, {"error": "down for maintenance"}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                hub.commits.append(value["summary"])
            elif line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.blobs[value["oid"]]
        repo = path.removeprefix("/api/models/").partition("/commit/")[0]
        return 200, {"commitUrl": f"{hub.url}/{repo}/commit/0123", "commitOid": "0123", "success": True}
    return (200, {"sha": "0" * 40, "siblings": [], "id": path}) if method == "GET" else (404, {"error": path})
