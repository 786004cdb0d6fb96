"""One of the processes that `rlhf --processes` started, as seen from inside: its channel to the supervisor.

The channel is a socket. What went wrong travels through it instead of being printed, since only the supervisor can tell
the first failure from those that follow it. It also is a leash: when the supervisor is gone, so is this process.
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

CHANNEL = "RLHF_CHANNEL"
"""Environment variable with the number of the open socket to the supervisor."""

_is_supervised = False


def is_supervised() -> bool:
    """Whether our supervisor started this process; known once `Worker.adopt` was called."""
    return _is_supervised


class Worker:
    """This process, started by our supervisor.

    Args:
        channel: to the supervisor.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        threading.Thread(target=self._watch, name="rlhf-leash", daemon=True).start()

    @classmethod
    def adopt(cls) -> Worker | None:
        """The worker that this process is; None where something else started it."""
        number = os.environ.pop(CHANNEL, None)  # programs that a reward function starts are no workers
        if number is None:
            return None
        global _is_supervised
        _is_supervised = True
        channel = socket.socket(fileno=int(number))
        channel.set_inheritable(False)
        return cls(channel)

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while self._channel.recv(1):  # the supervisor says nothing; the end of its silence is its death
                pass
        os.killpg(os.getpgrp(), signal.SIGKILL)  # a group of our own, with whatever a reward function started

    def fail(self, error: BaseException, report: Callable[[BaseException], int]) -> None:
        """Tell the supervisor what `report` would print, and end with its exit code; does not return."""
        from rlhf_cli.distributed.rendezvous import is_lost_peer

        at, text = time.monotonic(), io.StringIO()
        with contextlib.redirect_stderr(text):
            code = report(error)
        said = {"code": code, "text": text.getvalue(), "at": at, "lost_peer": is_lost_peer(error)}
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(said).encode() + b"\n")
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by `sys.exit`: torch's threads wait for processes that may be gone, or abort while they are taken down.
        os._exit(code)
