"""Load test of the labeling server with many annotators, while it is killed repeatedly.

    python benchmarks/label_server.py --clients 50 --seconds 120 --kills 10
    python benchmarks/label_server.py --clients 200 --seconds 60

Starts the server in a separate process. Every client submits one label per second over its own connection, and repeats
a submission with the same key until it is acknowledged. The server is killed and restarted `--kills` times. At the end
every acknowledged key must be in the store exactly once, and no task may have two labels; otherwise the script exits
with 1. It prints milliseconds from submission to acknowledgement: of all labels, and of those that succeeded at the
first attempt, which excludes the times when the server was down.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.data.records import Candidates
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession

ANSWERS = 4
_SERVER = """
import json, sys
from pathlib import Path
from rlhf_cli.labeling.web.serving import serve
def announce(links):
    print(json.dumps([links.address, dict(links.annotators)]), flush=True)
serve(Path(sys.argv[1]), port=int(sys.argv[2]), annotators=sys.argv[3:], announce=announce)
"""


class LabelServer:
    """The labeling server in a separate process.

    Args:
        store: a prepared store.
        names: names of the annotators.
    """

    def __init__(self, store: Path, names: list[str]) -> None:
        self.store, self.names = store, names
        self.port = 0
        self.tokens: dict[str, str] = {}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the server, on the same port as before, and wait until it listens."""
        command = [sys.executable, "-c", _SERVER, str(self.store), str(self.port), *self.names]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the server did not start")
        address, links = json.loads(line)
        self.port = int(address.rpartition(":")[2])
        self.tokens = {name: link.partition("#")[2] for name, link in links.items()}

    def end(self, signum: int) -> None:
        """Send a signal and wait until the process has ended."""
        assert self.process is not None
        self.process.send_signal(signum)
        self.process.wait()


@dataclass
class Measured:
    """Measurements of the clients.

    Attributes:
        acknowledged: (annotator, key) of every acknowledged label.
        all_ms: milliseconds from first submission to acknowledgement.
        clean_ms: the same for labels acknowledged at the first attempt.
        retries: number of labels submitted more than once.
    """

    acknowledged: list[tuple[str, str]] = field(default_factory=list)
    all_ms: list[float] = field(default_factory=list)
    clean_ms: list[float] = field(default_factory=list)
    retries: int = 0


class Client:
    """One annotator: one connection, one label per second."""

    def __init__(self, server: LabelServer, name: str, measured: Measured) -> None:
        self._server, self._name, self._measured = server, name, measured
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._rng = random.Random(name)

    async def work(self, until: float, offset: float) -> None:
        """Label until a time of the monotonic clock."""
        await asyncio.sleep(offset)
        task = (await self._ask("GET", "/api/session", None))["task"]
        due = time.monotonic()
        count = 0
        while task is not None and time.monotonic() < until:
            order = list(range(len(task["completions"])))
            self._rng.shuffle(order)
            count += 1
            body = {
                "task": task["id"],
                "entry": {"tiers": [[position] for position in order]},
                "key": f"{self._name}-{count}",
                "active_seconds": 1.0,
            }
            task = (await self._submit(body))["task"]
            # Each client keeps its own offset within the second, since annotators are independent.
            due += max(1.0, math.ceil(time.monotonic() - due))
            await asyncio.sleep(due - time.monotonic())
        if self._streams is not None:
            self._streams[1].close()

    async def _submit(self, body: dict[str, Any]) -> dict[str, Any]:
        attempts: list[int] = []
        began = time.perf_counter()
        answer = await self._ask("POST", "/api/submit", body, attempts)
        took = 1000 * (time.perf_counter() - began)
        self._measured.acknowledged.append((self._name, body["key"]))
        self._measured.all_ms.append(took)
        if len(attempts) == 1:
            self._measured.clean_ms.append(took)
        else:
            self._measured.retries += 1
        return answer

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None, attempts: list[int] | None = None
    ) -> dict[str, Any]:
        while True:
            if attempts is not None:
                attempts.append(1)
            try:
                status, answer = await self._once(method, path, body)
            except (OSError, asyncio.IncompleteReadError):
                self._streams = None
                await asyncio.sleep(0.05 + 0.1 * self._rng.random())
                continue
            if status != 200:
                raise RuntimeError(f"{path}: {status} {answer}")
            return answer

    async def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """Minimal HTTP/1.1 client, so that the load uses less CPU than the server."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._server.port)
        reader, writer = self._streams
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._server.port}\r\n"
            f"Authorization: Bearer {self._server.tokens[self._name]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        return int(lines[0].split()[1]), json.loads(await reader.readexactly(length))


async def _kill(server: LabelServer, kills: int, seconds: float) -> None:
    """Kill and restart the server at random moments, spread over the duration."""
    rng = random.Random(kills)
    part = seconds / (kills + 1)
    began = time.monotonic()
    for number in range(kills):
        await asyncio.sleep(max(0.0, began + part * (number + 0.6 + 0.8 * rng.random()) - time.monotonic()))
        server.end(signal.SIGKILL)
        await asyncio.to_thread(server.start)


def check(store: Path, measured: Measured) -> dict[str, int]:
    """Count lost and duplicate labels in the store."""
    connection = sqlite3.connect(store)
    rows = connection.execute(
        "SELECT annotators.name, substr(key, instr(key, ':') + 1), assignment FROM actions "
        "JOIN assignments ON assignments.id = assignment JOIN annotators ON annotators.id = annotator"
    ).fetchall()
    damage = connection.execute("PRAGMA integrity_check").fetchone()[0]
    connection.close()
    stored = [(name, key) for name, key, _ in rows]
    return {
        "stored": len(stored),
        "lost": len(set(measured.acknowledged) - set(stored)),
        "doubled": len(stored) - len(set(stored)) + len(rows) - len({task for _, _, task in rows}),
        "damaged": int(damage != "ok"),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the 50th, 95th and 99th percentile and the maximum, in milliseconds."""
    ordered = sorted(values)
    at = {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95, 99)}
    return {name: round(value, 1) for name, value in (at | {"max": ordered[-1]}).items()}


def measure(folder: Path, clients: int, seconds: float, kills: int) -> dict[str, Any]:
    """Run the load test. Returns counts and percentiles."""
    store = folder / "labels.sqlite"
    session = LabelSession(store)
    texts = ["The same answer, over and over. " * 8 + str(number) for number in range(ANSWERS)]
    items = [Candidates(f"Question {item}?", tuple(texts)) for item in range(int(clients * (seconds + 10)))]
    session.prepare(LabelPlan(), items)
    session.close()
    names = [f"client {number}" for number in range(clients)]
    server, measured = LabelServer(store, names), Measured()
    server.start()

    async def everybody() -> None:
        until = time.monotonic() + seconds
        people = [Client(server, name, measured).work(until, number / clients) for number, name in enumerate(names)]
        await asyncio.gather(_kill(server, kills, seconds), *people)

    try:
        asyncio.run(everybody())
    finally:
        server.end(signal.SIGTERM)
    return {
        "clients": clients,
        "seconds": seconds,
        "kills": kills,
        "load_average": round(os.getloadavg()[0], 2),
        "acknowledged": len(measured.acknowledged),
        "sent_again": measured.retries,
        **check(store, measured),
        "all_ms": percentiles(measured.all_ms),
        "outside_kills_ms": percentiles(measured.clean_ms),
    }


def main() -> None:
    """Run the load test and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--kills", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), given.clients, given.seconds, given.kills)
    print(json.dumps(result, indent=2))
    if result["lost"] or result["doubled"] or result["damaged"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
