"""Runs this command in a process of its own, which hands the terminal over before it has ended.

Until then it has the user's terminal, and signals are forwarded to it. Afterwards it works in the background, and this
process asks a person something. When this process dies, the other one ends at once (`distributed.worker`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from rlhf_cli.distributed.signals import handling
from rlhf_cli.distributed.silent_ends import died, show_last_output
from rlhf_cli.distributed.worker import CHANNEL, OUTPUT
from rlhf_cli.errors import EXIT_IN_USE, EXIT_WAITING, ReportedError
from rlhf_cli.run_log import open_log

_POLL = 0.1
"""Seconds between two looks at the process."""
QUICK_STOP = 1.0
"""Seconds to stop without a message."""
LONGEST_STOP = 20.0
"""Seconds to stop; then the process is killed, which loses what is not on disk yet."""
_SAMPLER = "the process that samples"


class BackgroundCommand:
    """This command in a process of its own, stopped at the end of the `with` block.

    Args:
        command: it calls `hand_over`, and ends with exit code 76 when it waits for people.
        log: log of the run, to which an error of the process is added.

    Attributes:
        has_failed: whether it ended with an error, set by a thread.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command, self._log = command, log
        self.has_failed = threading.Event()
        self._changed = threading.Event()
        self._message: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self._is_stopped = False

    def __enter__(self) -> Self:
        self._output = tempfile.TemporaryFile()
        self._channel, theirs = socket.socketpair()
        with theirs:
            passed = {CHANNEL: theirs.fileno(), OUTPUT: self._output.fileno()}
            self._process = subprocess.Popen(  # noqa: S603  (the command that the user started)
                self._command,
                env={**os.environ, **{name: str(number) for name, number in passed.items()}},
                pass_fds=tuple(passed.values()),
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C reaches it through this process alone, or not at all while a person types
            )
        self._thread = threading.Thread(target=self._watch, name="background-command", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            self._channel.close()
            self._output.close()

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def wait(self) -> Mapping[str, str] | None:
        """Wait until the process hands the terminal over; returns its message, or None if it has done all its work.

        Raises:
            ReportedError: it failed; its error was printed, and the exit code is its own.
            ProcessDiedError: it was killed, or ended without reporting an error.
        """
        with handling(self._forward, self._suspend):
            while not self._changed.wait(_POLL):
                pass
        if self._message is not None:
            return self._message
        self._thread.join()
        self.check()
        return None

    def stop(self) -> None:
        """Ask the process to save and end, and wait for that; kill it at a second Ctrl-C, or if it takes too long."""
        self._is_stopped = True
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._thread.join(QUICK_STOP)
            if self._thread.is_alive():
                with contextlib.suppress(OSError):  # the terminal may have been closed
                    print(
                        "waiting until sampling stops after its token, up to 20 seconds; Ctrl-C stops it at once",
                        file=sys.stderr,
                    )
                self._thread.join(LONGEST_STOP)
        except KeyboardInterrupt:
            pass  # what is on disk is complete
        if self.is_running:
            self._signal_group(signal.SIGKILL)
        self._thread.join()

    def finish(self) -> None:
        """Wait for the end of a process that has nothing left to do."""
        self._thread.join(LONGEST_STOP)

    def check(self) -> None:
        """Print and raise the error with which the process ended; not if `stop` ended it.

        Raises:
            ReportedError, ProcessDiedError: see `wait`.
        """
        if not self.has_failed.is_set():
            return
        code, error = self._process.returncode, self._error
        if code != EXIT_IN_USE and self._log.parent.is_dir():
            open_log(self._log)
        if error is not None:
            sys.stderr.write(error["text"])
            sys.stderr.flush()
            raise ReportedError(error["code"], error["plain"])
        self._output.seek(0)
        show_last_output(_SAMPLER, self._output.read())
        raise died(_SAMPLER, code, resuming="; labels and finished completions are kept")

    def _watch(self) -> None:
        """Read what the process reports until its end."""
        # ValueError: half a line, of a process that was killed while it wrote.
        with contextlib.suppress(OSError, ValueError), self._channel.makefile("rb") as lines:
            for line in lines:
                received = json.loads(line)
                if "handed_over" in received:
                    self._message = received["handed_over"]
                    self._changed.set()
                else:
                    self._error = received
        code = self._process.wait()
        waits = code == EXIT_WAITING and self._message is not None
        if code != 0 and not waits and not self._is_stopped:
            self.has_failed.set()
        self._changed.set()

    def _signal_group(self, signum: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signum)

    def _forward(self, signum: int, frame: FrameType | None) -> None:
        if self.is_running:
            self._process.send_signal(signum)

    def _suspend(self, signum: int, frame: FrameType | None) -> None:
        """Ctrl-Z: suspend the process together with this one, and resume it."""
        self._signal_group(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_group(signal.SIGCONT)
