"""Starts and watches the processes of `rlhf --processes N`: signals, deaths, and which failure is shown.

Rank 0 has the user's terminal. The output of the other ranks is kept; its last lines are shown if a rank dies without
reporting an error. All ranks report errors through their channel (`distributed.worker`). Of several failures the first
is shown, but never one that only reports the end of another process.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_cli.distributed.process_group import LISTENER
from rlhf_cli.distributed.signals import handling
from rlhf_cli.distributed.silent_ends import died, show_last_output
from rlhf_cli.distributed.worker import CHANNEL
from rlhf_cli.errors import EXIT_IN_USE, Interrupted, ProcessDiedError, ReportedError
from rlhf_cli.run_log import open_log
from rlhf_cli.verbosity import is_verbose

_AFTER_FAILURE = 2.0
"""Seconds that the other ranks have to end after one has failed; they may be waiting for it."""
_AFTER_LOST_PEER = 8.0
"""Seconds to find the rank whose end the others report."""
_AFTER_STOP = 120.0
"""Seconds that the other ranks have to save after a signal, once the first has ended."""
_AFTER_RANK_0 = 1.0
"""Seconds that the other ranks have once rank 0 has succeeded: it does the last work of a run."""
_KEPT_BYTES = 1 << 16
"""Bytes of a rank's output that are kept."""
_POLL = 0.1
"""Seconds between two checks for ranks that have ended."""
_MAX_READS = 64
"""Reads of an ended rank's output; programs that it started may still be writing."""
_SIGNALS_OF_LIBRARIES = (signal.SIGABRT,)
"""Signals that a library sends to its own process, often because another rank has ended."""


@dataclass
class _Rank:
    """One of the processes.

    Attributes:
        number: its rank.
        process: the process.
        channel: socket through which it reports an error.
        received: bytes from the channel.
        tail: last bytes of its stdout and stderr; empty for rank 0, which has the user's.
        ended: when its end was noticed, by `time.monotonic`.
        signalled: whether a request to stop was sent to it.
        killed: whether the supervisor killed it.
    """

    number: int
    process: subprocess.Popen[bytes]
    channel: socket.socket
    received: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    ended: float | None = None
    signalled: bool = False
    killed: bool = False

    @property
    def failed(self) -> bool:
        """Whether it ended by itself with an error."""
        return self.ended is not None and not self.killed and self.process.returncode != 0

    @property
    def report(self) -> dict[str, Any]:
        """The error that it reported; empty if it reported none."""
        return json.loads(self.received) if self.received.endswith(b"\n") else {}

    @property
    def order(self) -> tuple[int, float]:
        """Sort key of failures: the smallest is shown."""
        if self.report:
            return (2 if self.report["lost_peer"] else 1), self.report["at"]
        code, at = self.process.returncode, self.ended or 0.0
        return (0 if code < 0 and -code not in _SIGNALS_OF_LIBRARIES else 1), at

    def kill(self) -> None:
        """Kill it and whatever it started, unless its end was noticed before."""
        if self.ended is None:
            self.killed = True
            self.kill_group()

    def kill_group(self) -> None:
        """Kill its process group; call it before the process is reaped, since the id may be reused afterwards."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def supervise(command: Sequence[str], count: int, environment: Mapping[str, str], log: Path | None = None) -> None:
    """Run `command` in `count` processes and return when all have succeeded.

    Args:
        command: of each process; it calls `Worker.adopt` to report errors.
        count: number of processes.
        environment: of all processes; RANK and the other variables of a launcher are added.
        log: log of the run, to which rank 0 writes; a failure is added to it.

    Raises:
        ReportedError: a rank failed; its error was printed, and the exit code is its own.
        ProcessDiedError: a rank was killed, or ended without reporting an error.
        Interrupted: a signal stopped the ranks before they could report it.
    """
    _Supervisor(command, count, environment, log).run()


class _Supervisor:
    """The state of one `supervise` call."""

    def __init__(self, command: Sequence[str], count: int, environment: Mapping[str, str], log: Path | None) -> None:
        self._signum: int | None = None
        self._at_once = False
        self._selector = selectors.DefaultSelector()
        self._ranks: list[_Rank] = []
        self._command, self._count, self._environment, self._log = command, count, environment, log

    def run(self) -> None:
        """Start all ranks and wait for their end."""
        with handling(self._stop, self._suspend):
            try:
                self._start()
                self._wait()
            finally:
                for rank in self._ranks:
                    rank.kill()
                for rank in self._ranks:
                    rank.process.wait()
                self._selector.close()
            self._raise_failure()

    def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=self._count) as listener:
            port = listener.getsockname()[1]
            shared = {"WORLD_SIZE": self._count, "LOCAL_WORLD_SIZE": self._count, "MASTER_ADDR": "127.0.0.1"}
            shared |= {"MASTER_PORT": port, LISTENER: listener.fileno()}
            for number in range(self._count):
                self._ranks.append(self._spawn(number, shared, listener))
                self._forward_signal()  # one that came before this rank was started

    def _spawn(self, number: int, shared: Mapping[str, object], listener: socket.socket) -> _Rank:
        ours, theirs = socket.socketpair()
        own = {"RANK": number, "LOCAL_RANK": number, CHANNEL: theirs.fileno()}
        output = None if number == 0 else subprocess.PIPE
        process = subprocess.Popen(  # noqa: S603  (the command that the user started)
            self._command,
            env={**self._environment, **{name: str(value) for name, value in {**shared, **own}.items()}},
            pass_fds=[theirs.fileno(), *([listener.fileno()] if number == 0 else [])],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # so that Ctrl-C in a terminal reaches each rank once, through the supervisor
        )
        theirs.close()
        rank = _Rank(number, process, ours)
        self._register(ours.fileno(), rank.received)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                self._register(stream.fileno(), rank.tail)
        return rank

    def _register(self, source: int, into: bytearray) -> None:
        os.set_blocking(source, False)
        self._selector.register(source, selectors.EVENT_READ, into)

    def _wait(self) -> None:
        deadline = float("inf")
        while any(rank.ended is None for rank in self._ranks) and not self._at_once:
            self._poll()
            limit = self._seconds_left()
            if limit is not None:
                deadline = min(deadline, time.monotonic() + limit)
            if time.monotonic() > deadline:
                return

    def _poll(self) -> None:
        """Read what the ranks wrote and notice which have ended; the output of an ended rank is read first."""
        ended = [rank for rank in self._ranks if rank.ended is None and rank.process.poll() is not None]
        for rank in ended:
            rank.kill_group()
        for _ in range(_MAX_READS if ended else 1):
            events = self._selector.select(0.0 if ended else _POLL)
            for key, _ in events:
                self._read(key)
            if not events:
                break
        for rank in ended:
            rank.ended = time.monotonic()

    def _read(self, key: selectors.SelectorKey) -> None:
        try:
            found = os.read(key.fd, _KEPT_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            found = b""
        if not found:
            self._selector.unregister(key.fd)
        key.data.extend(found)
        if any(key.data is rank.tail for rank in self._ranks):
            if is_verbose():
                sys.stderr.write(found.decode(errors="replace"))
            del key.data[:-_KEPT_BYTES]

    def _seconds_left(self) -> float | None:
        """Seconds that the running ranks have from now on; None for no limit."""
        if self._ranks[0].ended is not None and self._ranks[0].process.returncode == 0:
            return _AFTER_RANK_0
        failed = [rank for rank in self._ranks if rank.failed]
        if not failed:
            return None
        first = min(failed, key=lambda rank: rank.order)
        if first.report.get("code") in (130, 143) or self._ended_by_our_signal(first):
            return _AFTER_STOP
        return _AFTER_LOST_PEER if first.order[0] == 2 else _AFTER_FAILURE

    def _ended_by_our_signal(self, rank: _Rank) -> bool:
        """Whether the forwarded signal ended it before it could report that."""
        return self._signum is not None and rank.process.returncode == -self._signum

    def _follows(self, rank: _Rank) -> bool:
        """Whether it stopped because another rank asked all to: no signal came from outside."""
        return self._signum is None and rank.report.get("code") in (130, 143)

    def _raise_failure(self) -> None:
        if self._at_once:
            raise KeyboardInterrupt
        if self._ranks[0].ended is not None and self._ranks[0].process.returncode == 0:
            return  # it does the last work of a run
        if sys.stderr.isatty():  # a progress bar of rank 0 may have hidden the cursor
            sys.stderr.write("\033[?25h\n")
        failed = sorted(
            (rank for rank in self._ranks if rank.failed), key=lambda rank: (self._follows(rank), *rank.order)
        )
        first = failed[0]
        if self._log is not None and first.report.get("code") != EXIT_IN_USE and self._log.parent.is_dir():
            open_log(self._log)
        if self._ended_by_our_signal(first) or (self._signum is not None and first.order[0] == 2):
            assert self._signum is not None
            raise Interrupted(self._signum)
        if not first.report:
            raise self._died_silently(first)
        same = [rank for rank in failed if rank.report.get("text") == first.report["text"]]
        if self._ranks[0] not in same:
            print(f"rank {first.number} of {self._count} failed:", file=sys.stderr)
        sys.stderr.write(first.report["text"])
        sys.stderr.flush()
        raise ReportedError(first.report["code"], first.report["plain"])

    def _died_silently(self, rank: _Rank) -> ProcessDiedError:
        """The error for a rank that ended without reporting one."""
        show_last_output(f"rank {rank.number}", bytes(rank.tail))
        return died(
            f"rank {rank.number} of {self._count}", rank.process.returncode, resuming=" from the last checkpoint"
        )

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """Forward the first signal to every rank once; a second Ctrl-C kills them."""
        if self._signum is not None:
            self._at_once |= signum == signal.SIGINT
            return
        self._signum = signum
        self._forward_signal()

    def _forward_signal(self) -> None:
        for rank in self._ranks:
            if self._signum is not None and not rank.signalled:
                rank.signalled = True
                rank.process.send_signal(self._signum)

    def _suspend(self, signum: int, frame: FrameType | None) -> None:
        """Ctrl-Z: suspend all ranks with the supervisor, and resume them with it."""
        for rank in self._ranks:
            rank.process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for rank in self._ranks:
            rank.process.send_signal(signal.SIGCONT)
