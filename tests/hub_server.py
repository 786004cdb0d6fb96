"""A server on the loopback that speaks as much of the hub's API as a download of a model needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from rlhf_cli.models import hub

COMMIT = "c0ffee" + "0" * 34


def forget() -> None:
    """Forget which commits were found, as a new process does."""
    hub.commit_of.cache_clear()
    hub.download.cache_clear()


class HubServer(ThreadingHTTPServer):
    """Serves folders as models of one commit; `failing` maps an id to an HTTP status, or to 0 for no answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, Path] = {}
        self.failing: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        self.commit = COMMIT

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0]).strip("/")
        self.server.requests.append(path)
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if name in self.server.failing:
            self._fail(*self.server.failing[name])
        elif name not in self.server.models:
            self._fail(404, "RepoNotFound")
        elif "/resolve/" in path:
            self._file(self.server.models[name] / path.partition("/resolve/")[2].partition("/")[2])
        elif "/tree/" in path:
            self._json([_entry(file, self.server.models[name]) for file in _files(self.server.models[name])])
        else:
            names = [
                {"rfilename": file.relative_to(self.server.models[name]).as_posix()}
                for file in _files(self.server.models[name])
            ]
            self._json(
                {
                    "_id": "1",
                    "id": name,
                    "modelId": name,
                    "sha": self.server.commit,
                    "siblings": names,
                    "private": False,
                }
            )

    def _commit(self) -> str:
        named = [part for part in self.path.split("/") if len(part) == 40]
        return named[0] if named else self.server.commit

    def _fail(self, status: int, code: str) -> None:
        if status == 0:
            time.sleep(30)
            return
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._fail(404, "EntryNotFound")
            return
        body = file.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("X-Repo-Commit", self._commit())
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start:])


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _entry(file: Path, folder: Path) -> dict[str, object]:
    body = file.read_bytes()
    digest = hashlib.sha1(body).hexdigest()
    return {"type": "file", "path": file.relative_to(folder).as_posix(), "size": len(body), "oid": digest}


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """Context with a running server."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
