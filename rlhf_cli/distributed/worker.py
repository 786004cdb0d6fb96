"""One of the processes that `rlhf --processes` or `BackgroundCommand` started, and its channel to the supervisor.

The channel is a socket. A worker sends its error through it instead of printing it, since only the supervisor can tell
the first failure from those that follow. When the supervisor dies, the socket closes and the worker ends itself.

A background command also hands the terminal over to its supervisor (`hand_over`), which then asks a person something.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from rlhf_cli.distributed.process_group import exit_without_teardown, is_lost_peer

CHANNEL = "RLHF_CHANNEL"
"""Environment variable with the file descriptor of the socket to the supervisor."""

OUTPUT = "RLHF_OUTPUT"
"""Environment variable with the file that takes the place of the terminal after `hand_over`, as a descriptor."""

_is_supervised = False
_background: Worker | None = None
_is_handed_over = False


def is_supervised() -> bool:
    """Whether the supervisor of `--processes` started this process; known after `Worker.adopt`."""
    return _is_supervised


def hand_over(**message: str) -> None:
    """Tell the supervisor of a background command that the terminal is its own from now on; else do nothing.

    What this process writes to stdout and stderr goes to a file of the supervisor afterwards. Call it outside `task`,
    whose bar would go on.

    Args:
        message: what the supervisor needs to know.
    """
    global _is_handed_over
    if _background is not None and not _is_handed_over:
        _is_handed_over = True
        _background.leave_terminal(message)


def is_handed_over() -> bool:
    """Whether the terminal was handed over."""
    return _is_handed_over


def is_background() -> bool:
    """Whether `BackgroundCommand` started this process, and opens interfaces in its place."""
    return _background is not None


class Worker:
    """This process, started by the supervisor.

    Args:
        channel: socket to the supervisor.
        output: descriptor of a file, for `leave_terminal`.
    """

    def __init__(self, channel: socket.socket, output: int | None = None) -> None:
        self._channel, self._output = channel, output
        threading.Thread(target=self._watch_supervisor, name="rlhf-supervisor-watch", daemon=True).start()

    @classmethod
    def adopt(cls) -> Worker | None:
        """The worker that this process is; None if something else started it."""
        number = os.environ.pop(CHANNEL, None)  # programs that a reward function starts are not workers
        if number is None:
            return None
        global _is_supervised, _background
        channel = socket.socket(fileno=int(number))
        channel.set_inheritable(False)
        output = os.environ.pop(OUTPUT, None)
        if output is None:
            _is_supervised = True
            return cls(channel)
        os.set_inheritable(int(output), False)
        _background = cls(channel, int(output))
        return _background

    def leave_terminal(self, message: dict[str, str]) -> None:
        """See `hand_over`."""
        assert self._output is not None
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(self._output, descriptor)
        with contextlib.suppress(OSError):  # the supervisor has died: `_watch_supervisor` ends this process
            self._channel.sendall(json.dumps({"handed_over": message}).encode() + b"\n")

    def _watch_supervisor(self) -> None:
        with contextlib.suppress(OSError):
            while self._channel.recv(1):  # the supervisor never sends anything: this returns when it has died
                pass
        os.killpg(os.getpgrp(), signal.SIGKILL)  # this process and whatever a reward function started

    def fail(self, error: BaseException, report: Callable[[BaseException], dict[str, Any]]) -> NoReturn:
        """Send the supervisor what `report` prints and returns, and exit with its `exit_code`; does not return."""
        at, text = time.monotonic(), io.StringIO()
        with contextlib.redirect_stderr(text):
            plain = report(error)
        code = plain["exit_code"]
        message = {"code": code, "text": text.getvalue(), "plain": plain, "at": at, "lost_peer": is_lost_peer(error)}
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        exit_without_teardown(code)
