"""One of the processes that `rlhf --processes` started, and its channel to the supervisor.

The channel is a socket. A worker sends its error through it instead of printing it, since only the supervisor can tell
the first failure from those that follow. When the supervisor dies, the socket closes and the worker ends itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from rlhf_cli.distributed.process_group import exit_without_teardown, is_lost_peer

CHANNEL = "RLHF_CHANNEL"
"""Environment variable with the file descriptor of the socket to the supervisor."""

_is_supervised = False


def is_supervised() -> bool:
    """Whether the supervisor started this process; known after `Worker.adopt`."""
    return _is_supervised


class Worker:
    """This process, started by the supervisor.

    Args:
        channel: socket to the supervisor.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        threading.Thread(target=self._watch_supervisor, name="rlhf-supervisor-watch", daemon=True).start()

    @classmethod
    def adopt(cls) -> Worker | None:
        """The worker that this process is; None if something else started it."""
        number = os.environ.pop(CHANNEL, None)  # programs that a reward function starts are not workers
        if number is None:
            return None
        global _is_supervised
        _is_supervised = True
        channel = socket.socket(fileno=int(number))
        channel.set_inheritable(False)
        return cls(channel)

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
