"""A server on the loopback that speaks as much of the hub's API as an upload needs; it takes all files inline."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class UploadServer(ThreadingHTTPServer):
    """Keeps what is uploaded. `failing` is the status of every reply but 200; `repos` maps a name to its visibility."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.failing: int | None = None
        self.repos: dict[str, bool] = {}
        self.branches: list[str] = []
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: UploadServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply()

    def do_POST(self) -> None:
        self._reply()

    def _reply(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.paths.append(path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.failing is not None:
            self._send({"error": "no"}, self.server.failing)
        elif path == "/api/repos/create":
            given = json.loads(body)
            name = "/".join(part for part in (given.get("organization") or "ann", given["name"]) if part)
            is_private = bool(given.get("private")) or given.get("visibility") == "private"
            status = 409 if name in self.server.repos else 200
            self.server.repos.setdefault(name, is_private)
            self._send({"url": f"{self.server.url}/{name}", "id": name, "name": name}, status)
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "/branch/" in path:
            self.server.branches.append(path.rpartition("/")[2])
            self._send({})
        elif "/preupload/" in path:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            self._send({"files": [one | {"shouldIgnore": False, "oid": None} for one in files]})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines() if line])
            commit = "c0ffee" + "0" * 34
            name = "/".join(path.split("/")[3:5])
            self._send({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})
        else:
            name = path.removeprefix("/api/models/")
            plain = {"_id": "1", "id": name, "modelId": name, "sha": "0" * 40, "siblings": []}
            self._send(plain | {"private": self.server.repos.get(name, False), "tags": [], "downloads": 0})

    def _commit(self, lines: list[dict]) -> None:
        for line in lines:
            if line["key"] == "header":
                self.server.messages.append(line["value"]["summary"])
            elif line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])

    def _send(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def upload_server() -> Iterator[UploadServer]:
    """Context with a running server."""
    server = UploadServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
