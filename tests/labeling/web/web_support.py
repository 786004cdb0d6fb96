"""Items to label, a server in a thread or in a process of its own, and the browser of this machine."""

from __future__ import annotations

import argparse
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_cli.data.records import Candidates
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.web.serving import serve
from rlhf_cli.labeling.web.tokens import ServerLinks


def numbered_items(count: int, answers: int = 4) -> list[Candidates]:
    """Items whose answers say which of the item they are: `answer 3.0` is the first of item 3."""
    return [
        Candidates(f"Question {item}?", tuple(f"answer {item}.{index}" for index in range(answers)))
        for item in range(count)
    ]


def make_store(path: Path, items: list[Candidates], plan: LabelPlan | None = None) -> Path:
    """A store that is ready to be labeled."""
    session = LabelSession(path)
    session.prepare(plan or LabelPlan(), items)
    session.close()
    return path


@contextmanager
def served(
    store: Path, annotators: list[str], *, port: int = 0, is_sampling: Callable[[], bool] = lambda: False
) -> Iterator[ServerLinks]:
    """A server in a thread of this process."""
    ready, stop, told = threading.Event(), threading.Event(), []
    failures: list[BaseException] = []

    def announce(links: ServerLinks) -> None:
        told.append(links)
        ready.set()

    def work() -> None:
        try:
            serve(store, port=port, annotators=annotators, announce=announce, stop=stop, is_sampling=is_sampling)
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        assert ready.wait(20)
        if failures:
            raise failures[0]
        yield told[0]
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def token_of(link: str) -> str:
    """The token of a link."""
    return link.partition("#")[2]


class Client:
    """Sends requests exactly as they are told."""

    def __init__(self, links: ServerLinks) -> None:
        self.links = links
        self.host = links.address.removeprefix("http://")
        self.port = int(self.host.rpartition(":")[2])

    def ask(
        self,
        method: str,
        path: str,
        *,
        token: str | None = None,
        body: bytes | dict[str, Any] | None = None,
        host: str | None = None,
        **headers: str,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer; underscores of header names stand for hyphens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        if host != "":
            connection.putheader("Host", host or self.host)
        if token is not None:
            connection.putheader("Authorization", f"Bearer {token}")
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        if content is not None:
            headers = {"content_type": "application/json", "content_length": str(len(content))} | headers
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(content)
        answer = connection.getresponse()
        read = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, read

    def of(self, name: str) -> str:
        """The token of an annotator."""
        return token_of(self.links.annotators[name])

    def task_of(self, name: str) -> dict[str, Any]:
        """The task that an annotator has in hand."""
        return json.loads(self.ask("GET", "/api/session", token=self.of(name))[2])["task"]


def whole_answer(task: dict[str, Any], key: str) -> dict[str, Any]:
    """An answer that the server would take."""
    tiers = [[position] for position in range(len(task["completions"]))]
    return {"task": task["id"], "entry": {"tiers": tiers}, "key": key, "active_seconds": 0}


def main() -> None:
    """Serve a store from a process of its own: `python web_support.py STORE --port N NAME ...`; links on stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("names", nargs="*")
    given = parser.parse_intermixed_args()

    def announce(links: ServerLinks) -> None:
        plain = {"address": links.address, "administrator": links.administrator, "annotators": dict(links.annotators)}
        print(json.dumps(plain), flush=True)

    serve(given.store, port=given.port, annotators=given.names, announce=announce)


if __name__ == "__main__":
    main()
