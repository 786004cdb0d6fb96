"""Run commands and functions on fake GPUs, and read what the devices counted."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import guard
from tests.gpu.ledger import Event, source_text

ROOT = Path(__file__).resolve().parents[2]
_numbers = itertools.count()


@dataclass(frozen=True)
class Outcome:
    """What a request did.

    Attributes:
        code: exit code of the command; 99 where Python raised.
        result: what a function returned.
        stdout, stderr: of the process; `raised` is the traceback of what it raised.
        events: what the devices counted.
        peak: most bytes of tensors that a device held at once.
        largest: those bytes by our line that allocated them, if the request was to follow them.
        package: folder of the rlhf_cli that ran.
    """

    code: int
    result: Any
    stdout: str
    stderr: str
    raised: str
    events: Counter[Event]
    peak: int
    largest: dict[str, int]
    package: str

    def count(self, kind: str) -> int:
        """Number of events of a kind."""
        return sum(count for event, count in self.events.items() if event.kind == kind)

    def described(self, events: Counter[Event]) -> str:
        """Return a table of events, the most frequent first, with the code of their lines."""
        rows = [
            f"{count:6d}  {event.kind:8s} {event.what:14s} {event.line:40s} {source_text(self.package, event.line)}"
            for event, count in events.most_common()
        ]
        return "\n".join(rows)


class Host:
    """The process of host.py; every request runs in a fork of it.

    Args:
        process: started by `fake_gpus`.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def command(self, folder: Path, *arguments: object, code: int | None = 0, **request: Any) -> Outcome:
        """Run `rlhf` with arguments in a folder; `code` is the exit status to insist on, None allows any."""
        found = self._ask(folder, arguments=[str(one) for one in arguments], **request)
        if code is not None and found.code != code:
            pytest.fail(f"rlhf {' '.join(map(str, arguments))} ended with {found.code}\n{found.stderr}\n{found.raised}")
        return found

    def call(self, folder: Path, function: str, *, named: dict[str, Any] | None = None, **request: Any) -> Outcome:
        """Call a function `module:name` with values that JSON can hold; fails where it raises."""
        found = self._ask(folder, call=function, named=named or {}, **request)
        if found.raised:
            pytest.fail(f"{function} raised\n{found.stderr}\n{found.raised}")
        return found

    def processes(
        self,
        folder: Path,
        count: int,
        *arguments: object,
        code: int = 0,
        package: Path = ROOT,
        stop_after: Path | None = None,
    ) -> list[Outcome]:
        """Run `rlhf` in several processes, each with a GPU of its own, as torchrun does on one machine.

        Args:
            folder: working directory.
            count: number of processes.
            arguments: of the command.
            code: exit status of each to insist on.
            package: see `host`.
            stop_after: each gets SIGTERM once this path exists.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        requests = [
            self._request(folder, package, arguments=[str(one) for one in arguments], suffix=f"-{rank}", follow=True,
                          stop_after=None if stop_after is None else str(stop_after),
                          environment={k: str(v) for k, v in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()})
            for rank in range(count)
        ]  # fmt: skip
        found = self._outcomes(requests)
        if any(one.code != code for one in found):
            said = "\n".join(f"{one.stderr}\n{one.raised}" for one in found)
            pytest.fail(f"rlhf {' '.join(map(str, arguments))} ended with {[one.code for one in found]}\n{said}")
        return found

    def _ask(self, folder: Path, *, package: Path = ROOT, **request: Any) -> Outcome:
        return self._outcomes([self._request(folder, package, **request)])[0]

    def _request(self, folder: Path, package: Path, **request: Any) -> dict[str, Any]:
        answer = folder / f"answer-{next(_numbers)}.json"
        return {"package": str(package), "folder": str(folder), "answer": str(answer), **request}

    def _outcomes(self, requests: Sequence[dict[str, Any]]) -> list[Outcome]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{json.dumps(requests)}\n")
        stdin.flush()
        statuses = stdout.readline().split() or ["its host"] * len(requests)
        return [_outcome(request, status) for request, status in zip(requests, statuses, strict=True)]


def _outcome(request: dict[str, Any], status: str) -> Outcome:
    """Read what a child wrote; fails the test where it did not come to that."""
    folder, answer = Path(request["folder"]), Path(request["answer"])
    texts = [(folder / (name + request.get("suffix", ""))).read_text(errors="replace") for name in ("stdout", "stderr")]
    if status != "0" or not answer.exists():
        pytest.fail(f"a process on the fake GPU ended with {status}\n{texts[1][-4000:]}")
    found = json.loads(answer.read_text())
    events = Counter({Event(kind, what, line): count for kind, what, line, count in found.get("events", ())})
    return Outcome(
        code=found["code"],
        result=found["result"],
        stdout=texts[0],
        stderr=texts[1],
        raised=found["raised"],
        events=events,
        peak=max(found.get("peak", {}).values(), default=0),
        largest=found.get("largest", {}),
        package=request["package"],
    )


def environment(devices: int) -> dict[str, str]:
    """Variables of a process that runs with so many fake GPUs."""
    return os.environ | {
        "CI": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices))),
    }


@contextmanager
def fake_gpus(devices: int = 1) -> Iterator[Host]:
    """Start a host; skips the test where the device cannot be built."""
    if (reason := guard.missing()) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.gpu.host", str(guard.build()), str(devices)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(devices) | {"TRITON_INTERPRET": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            process.wait()
            log.seek(0)
            raise AssertionError(f"the host of the fake GPU did not start: {log.read()[-3000:]}")
        try:
            yield Host(process)
        finally:
            process.kill()  # an interrupted test may have left it waiting for a child
