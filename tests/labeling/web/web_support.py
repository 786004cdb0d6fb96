"""Items to label, a server in a thread or in a process of its own, and the browser of this machine."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.data.records import Candidates
from rlhf_cli.labeling.session import LabelSession
from rlhf_cli.labeling.session_types import LabelPlan
from rlhf_cli.labeling.web.links import Links
from rlhf_cli.labeling.web.serving import serve


def numbered_items(count: int, answers: int = 4) -> list[Candidates]:
    """Items whose answers say which of the item they are: `answer 3.0` is the first of item 3."""
    return [
        Candidates(f"Question {item}?", tuple(f"answer {item}.{index}" for index in range(answers)))
        for item in range(count)
    ]


def make_store(path: Path, items: list[Candidates], plan: LabelPlan | None = None) -> Path:
    """A store that is ready to be labelled."""
    session = LabelSession(path)
    session.prepare(plan or LabelPlan(), items)
    session.close()
    return path


@contextmanager
def served(store: Path, annotators: list[str], *, port: int = 0) -> Iterator[Links]:
    """A server in a thread of this process."""
    ready, stop, told = threading.Event(), threading.Event(), []
    failures: list[BaseException] = []

    def announce(links: Links) -> None:
        told.append(links)
        ready.set()

    def work() -> None:
        try:
            serve(store, port=port, annotators=annotators, announce=announce, stop=stop)
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


def main() -> None:
    """Serve a store from a process of its own: `python web_support.py STORE --port N NAME ...`; links on stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("names", nargs="*")
    given = parser.parse_intermixed_args()

    def announce(links: Links) -> None:
        plain = {"address": links.address, "administrator": links.administrator, "annotators": dict(links.annotators)}
        print(json.dumps(plain), flush=True)

    serve(given.store, port=given.port, annotators=given.names, announce=announce)


if __name__ == "__main__":
    main()
