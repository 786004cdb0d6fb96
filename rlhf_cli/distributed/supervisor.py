"""Starts the processes of `rlhf --processes N` and answers for them: signals, deaths, and which failure is shown.

Rank 0 has the user's terminal. The others' output is kept, and its last lines are shown when one dies without a word.
All say through their channel what went wrong (`pipeline.worker`); of several failures the first is shown, and none that
only says that another process is gone.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from rlhf_cli.distributed.rendezvous import LISTENER
from rlhf_cli.distributed.worker import CHANNEL
from rlhf_cli.errors import Interrupted, ProcessDiedError, ReportedError

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_LAST_WORDS = 2.0
"""Seconds that the others have to end by themselves after one has failed; they may be waiting for it in vain."""
_CULPRIT = 8.0
"""Seconds in which the process is looked for that others say they have lost."""
_SAVING = 120.0
"""Seconds that the others have to save, after a signal, once the first has left."""
_PARTING = 1.0
"""Seconds that the others have once rank 0 is done: it does the last that matters."""
_KEPT = 1 << 16
"""Bytes of a rank's output that are kept."""
_SHOWN_LINES = 30
_EVERY = 0.1
"""Seconds between two looks at who has ended."""
_READS = 64
"""Reads of what an ended process has said; what it started may go on talking."""
_NO_WORD_OF_OURS = (signal.SIGABRT,)
"""Signals that a library sends itself, often because another process is gone."""


@dataclass
class _Rank:
    """One of the processes.

    Attributes:
        number: its rank.
        process: the process.
        channel: what it says through it.
        words: bytes from the channel.
        tail: last bytes of its stdout and stderr; rank 0's are the user's.
        ended: when its end was noticed, by `time.monotonic`.
        was_told: whether a request to stop was sent to it.
        was_killed: whether we ended it.
    """

    number: int
    process: subprocess.Popen[bytes]
    channel: socket.socket
    words: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    ended: float | None = None
    was_told: bool = False
    was_killed: bool = False

    @property
    def failed(self) -> bool:
        """Whether it ended by itself, and not well."""
        return self.ended is not None and not self.was_killed and self.process.returncode != 0

    @property
    def report(self) -> dict[str, Any]:
        """What it said of its failure; empty where it had no time to."""
        return json.loads(self.words) if self.words.endswith(b"\n") else {}

    @property
    def urgency(self) -> tuple[int, float]:
        """Sort key of failures: the first to be shown is the smallest."""
        if self.report:
            return (2 if self.report["lost_peer"] else 1), self.report["at"]
        code, at = self.process.returncode, self.ended or 0.0
        return (0 if code < 0 and -code not in _NO_WORD_OF_OURS else 1), at

    def kill(self) -> None:
        """End it and whatever it started, if its end was not noticed before."""
        if self.ended is None:
            self.was_killed = True
            self.kill_group()

    def kill_group(self) -> None:
        """End what it started, and itself; not later than its end is noticed, since the number may be reused then."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def supervise(command: Sequence[str], count: int, environment: Mapping[str, str]) -> None:
    """Run `command` in `count` processes.

    Args:
        command: each process's; it calls `Worker.adopt` to speak with us.
        count: processes.
        environment: for all of them; RANK and its like are added.

    Raises:
        ReportedError: a process failed; what it had to say was printed, and the exit code is its own.
        ProcessDiedError: a process was killed, or ended without a word.
        Interrupted: a signal stopped them before they could say so.
    """
    _Supervisor(command, count, environment).run()


class _Supervisor:
    """See `supervise`."""

    def __init__(self, command: Sequence[str], count: int, environment: Mapping[str, str]) -> None:
        self._signum: int | None = None
        self._at_once = False
        self._selector = selectors.DefaultSelector()
        self._ranks: list[_Rank] = []
        self._command, self._count, self._environment = command, count, environment

    def run(self) -> None:
        """Start all, wait for all."""
        with self._listening():
            try:
                self._start()
                self._wait()
            finally:
                for rank in self._ranks:
                    rank.kill()
                for rank in self._ranks:
                    rank.process.wait()
                self._selector.close()
            self._conclude()

    def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=self._count) as listener:
            port = listener.getsockname()[1]
            shared = {"WORLD_SIZE": self._count, "LOCAL_WORLD_SIZE": self._count, "MASTER_ADDR": "127.0.0.1"}
            shared |= {"MASTER_PORT": port, LISTENER: listener.fileno()}
            for number in range(self._count):
                self._ranks.append(self._spawn(number, shared, listener))
                self._pass_on()  # a signal that came before it was there

    def _spawn(self, number: int, shared: Mapping[str, object], listener: socket.socket) -> _Rank:
        ours, theirs = socket.socketpair()
        own = {"RANK": number, "LOCAL_RANK": number, CHANNEL: theirs.fileno()}
        output = None if number == 0 else subprocess.PIPE
        process = subprocess.Popen(  # noqa: S603  (this very command)
            self._command,
            env={**self._environment, **{name: str(value) for name, value in {**shared, **own}.items()}},
            pass_fds=[theirs.fileno(), *([listener.fileno()] if number == 0 else [])],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # so that Ctrl-C in a terminal reaches each once, through us
        )
        theirs.close()
        rank = _Rank(number, process, ours)
        self._listen(ours.fileno(), rank.words)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                self._listen(stream.fileno(), rank.tail)
        return rank

    def _listen(self, source: int, into: bytearray) -> None:
        os.set_blocking(source, False)
        self._selector.register(source, selectors.EVENT_READ, into)

    def _wait(self) -> None:
        deadline = float("inf")
        while any(rank.ended is None for rank in self._ranks) and not self._at_once:
            self._look()
            limit = self._limit()
            if limit is not None:
                deadline = min(deadline, time.monotonic() + limit)
            if time.monotonic() > deadline:
                return

    def _look(self) -> None:
        """Read what was said and notice who has ended; what an ended process has said is read first."""
        ended = [rank for rank in self._ranks if rank.ended is None and rank.process.poll() is not None]
        for rank in ended:
            rank.kill_group()
        for _ in range(_READS if ended else 1):
            events = self._selector.select(0.0 if ended else _EVERY)
            for key, _ in events:
                self._read(key)
            if not events:
                break
        for rank in ended:
            rank.ended = time.monotonic()

    def _read(self, key: selectors.SelectorKey) -> None:
        try:
            found = os.read(key.fd, _KEPT)
        except BlockingIOError:
            return
        except ConnectionResetError:
            found = b""
        if not found:
            self._selector.unregister(key.fd)
        key.data.extend(found)
        if any(key.data is rank.tail for rank in self._ranks):
            if self._environment.get("RLHF_DEBUG", "") not in ("", "0"):
                sys.stderr.write(found.decode(errors="replace"))
            del key.data[:-_KEPT]

    def _limit(self) -> float | None:
        """Seconds that those who still run have from now on; None for as many as they like."""
        if self._ranks[0].ended is not None and self._ranks[0].process.returncode == 0:
            return _PARTING
        failed = [rank for rank in self._ranks if rank.failed]
        if not failed:
            return None
        first = min(failed, key=lambda rank: rank.urgency)
        if first.report.get("code") in (130, 143) or self._is_stopped(first):
            return _SAVING
        return _CULPRIT if first.urgency[0] == 2 else _LAST_WORDS

    def _is_stopped(self, rank: _Rank) -> bool:
        """Whether the signal that we passed on ended it before it could say so."""
        return self._signum is not None and rank.process.returncode == -self._signum

    def _conclude(self) -> None:
        if self._at_once:
            raise KeyboardInterrupt
        if self._ranks[0].ended is not None and self._ranks[0].process.returncode == 0:
            return  # it is the last to do anything that matters
        self._restore_terminal()
        failed = sorted((rank for rank in self._ranks if rank.failed), key=lambda rank: rank.urgency)
        first = failed[0]
        if self._is_stopped(first) or (self._signum is not None and first.urgency[0] == 2):
            assert self._signum is not None
            raise Interrupted(self._signum)
        if not first.report:
            raise self._unsaid(first)
        same = [rank for rank in failed if rank.report.get("text") == first.report["text"]]
        if self._ranks[0] not in same:
            print(f"rank {first.number} of {self._count} failed:", file=sys.stderr)
        sys.stderr.write(first.report["text"])
        sys.stderr.flush()
        raise ReportedError(first.report["code"])

    def _unsaid(self, rank: _Rank) -> ProcessDiedError:
        """The error for a process that ended without a word."""
        code = rank.process.returncode
        lines = rank.tail.decode(errors="replace").splitlines()[-_SHOWN_LINES:]
        if lines:
            print(f"the last that rank {rank.number} said:", *lines, sep="\n  ", file=sys.stderr)
        if code >= 0:
            return ProcessDiedError(
                f"rank {rank.number} of {self._count} ended with exit code {code} and said nothing more", exit_code=code
            )
        name = signal.Signals(-code).name
        why = "the system kills a process when memory is short; " if -code == signal.SIGKILL else ""
        return ProcessDiedError(
            f"rank {rank.number} of {self._count} was killed by {name}",
            exit_code=128 - code,
            hint=f"{why}run the same command again to go on from the last checkpoint",
        )

    def _restore_terminal(self) -> None:
        if sys.stderr.isatty():  # a bar of rank 0's may have hidden the cursor and left its line open
            sys.stderr.write("\033[?25h\n")

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        handlers = dict.fromkeys(_STOPPING, self._stop) | {signal.SIGTSTP: self._suspend}
        before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """The first signal reaches every process once; a second Ctrl-C ends them."""
        if self._signum is not None:
            self._at_once |= signum == signal.SIGINT
            return
        self._signum = signum
        self._pass_on()

    def _pass_on(self) -> None:
        for rank in self._ranks:
            if self._signum is not None and not rank.was_told:
                rank.was_told = True
                rank.process.send_signal(self._signum)

    def _suspend(self, signum: int, frame: FrameType | None) -> None:
        """Ctrl-Z: all stop, and go on when we do."""
        for rank in self._ranks:
            rank.process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for rank in self._ranks:
            rank.process.send_signal(signal.SIGCONT)
