"""Processes of one run as forks of a process that has imported everything, since imports take longer than small runs.

They get the environment that torchrun sets, join over loopback, and end as any process of the program does.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_ENVIRONMENT = {
    "CI": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(_ROOT),
    "TORCH_CPP_LOG_LEVEL": "FATAL",  # a lost connection is said by the product
}


class Forks:
    """A process that has imported everything, whose forks run Python programs."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=os.environ | _ENVIRONMENT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self.ask({"poll": None})  # answered after the imports

    def ask(self, question: dict[str, Any]) -> Any:
        """Send a question; returns its answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._server.terminate()
        self._server.wait()


class Ranks:
    """Processes of one run; a `tests.faults.harness.Process`.

    Args:
        forks: of which they are forks.
        count: of the processes; 1 is a process without a launcher's environment.
        arguments: `sys.argv` of each; a script, or `rlhf` with its arguments.
        folder: working directory; rank 0 prints into `stderr` in it, rank 1 into `stderr-1`, and so on.
    """

    def __init__(self, forks: Forks, count: int, arguments: Sequence[str], folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._forks, self._codes, self._pids = forks, dict[int, int](), list[int]()
        for rank in range(count):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": port}  # fmt: skip
            log = str(folder / ("stderr" if rank == 0 else f"stderr-{rank}"))
            env = {name: str(value) for name, value in variables.items()} if count > 1 else {}
            self._pids.append(forks.ask({"argv": list(arguments), "env": env, "cwd": str(folder), "log": log}))

    @property
    def codes(self) -> list[int | None]:
        """The exit code of each; None while it runs."""
        for pid in self._pids:
            if pid not in self._codes and (code := self._forks.ask({"poll": pid})) is not None:
                self._codes[pid] = code
        return [self._codes.get(pid) for pid in self._pids]

    @property
    def returncode(self) -> int | None:
        """See `Process`: the first that is not 0."""
        codes = self.codes
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        """See `Process`."""
        return self.returncode

    def wait(self) -> int:
        """See `Process`."""
        code = self.wait_for(600)
        if code is None:
            raise TimeoutError(f"no end within 600 s: {self.codes}")
        return code

    def wait_for(self, seconds: float) -> int | None:
        """Wait for the end of all; returns the exit code, and None if some do not end."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.poll()

    def send_signal(self, signum: int, rank: int | None = None) -> None:
        """Send a signal to one of them, or to all that run."""
        for number, code in enumerate(self.codes):
            if code is None and rank in (None, number):
                os.kill(self._pids[number], signum)

    def end(self) -> None:
        """SIGKILL all and wait."""
        self.send_signal(signal.SIGKILL)
        self.wait_for(600)


def _serve() -> dict[str, Any] | None:
    """Fork for each program that is asked for; return in the fork, with what to run, and at the end."""
    _import_all()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what programs print is no answer
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            answer = _poll(question["poll"])
        elif (answer := os.fork()) == 0:
            return question
        channel.write(json.dumps(answer) + "\n")
        channel.flush()
    return None


def _import_all() -> None:
    import torch

    from rlhf_cli.cli.environment import prepare
    from tests.distributed import sharded  # noqa: F401
    from tests.preloaded import preload

    prepare()
    torch.set_num_threads(1)  # threads do not survive a fork
    for name in ("stages.ppo.run", "stages.ppo.trainer", "models.saving", "generation.policy_saving"):
        importlib.import_module(f"rlhf_cli.{name}")
    preload()


def _poll(pid: int | None) -> int | None:
    """Return the exit code of a fork that has ended, below 0 for a signal; None if it runs."""
    if pid is None:
        return None
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _become(program: dict[str, Any]) -> None:
    """Run a program in this process."""
    os.chdir(program["cwd"])
    os.environ.update(program["env"])
    log = os.open(program["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(descriptor, number)
    sys.argv = program["argv"]
    if sys.argv[0] == "rlhf":
        from rlhf_cli.cli import entry

        entry()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(_ROOT))
    if (asked := _serve()) is not None:
        _become(asked)
