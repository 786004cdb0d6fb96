"""Notices within seconds that another process has ended or its machine is gone, and says which, on which machine.

Every process of an external launcher keeps a connection to rank 0. The operating system closes it when the process
ends, and ends it when the other machine no longer answers its probes (TCP keepalive). Neither needs Python to run
there: a process that computes for an hour without releasing Python's lock, or that was suspended, is not taken for
dead. Rank 0 tells the others. A process that fails says why on its connection before it ends.

Collectives alone do not end then: NCCL waits for ever for a process that has ended, and so does gloo for a machine that
was switched off. So the thread that watches ends this process, unless its main thread ends by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlhf_cli.distributed.ranks import rank, world_size
from rlhf_cli.distributed.sockets import join_seconds, listen, own_address
from rlhf_cli.errors import ProcessDiedError
from rlhf_cli.run_log import write

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  (documented, not listed)

_KEY = "peers"
_RESPONSE = 15
"""Seconds in which a machine must answer; after them its processes are gone."""
_PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 5}
"""Options that reach `_RESPONSE`: seconds of silence before the first probe (its name on macOS second), seconds between
two, and how many may go unanswered."""
_NAMING = _RESPONSE + 3.0
"""Seconds to find out whose end ended a collective."""
_SETTLING = 0.5
"""Seconds in which the ends of other processes of the same machine are noticed too."""
_AFTER_DEATH = 3.0
"""Seconds that the main thread has to end by itself, once another one is gone."""
_AFTER_FAILURE = 10.0
"""Seconds that it has once another process has failed: it may be about to report the same error."""
_AFTER_STOP = 120.0
"""Seconds that it has to save once another process was stopped by a signal."""
_STOPPED = (130, 143)
_UNREACHABLE = "its machine does not answer"
_MAX_SHOWN = 8


@dataclass(frozen=True)
class Loss:
    """The end of another process.

    Attributes:
        rank: which.
        host: its machine.
        why: what is known of the cause.
        exit_code: that it reported; None if it ended without a report.
        is_consequence: whether it ended only because another one had.
    """

    rank: int
    host: str
    why: str
    exit_code: int | None = None
    is_consequence: bool = False

    @property
    def patience(self) -> float:
        """Seconds that the main thread has to end by itself."""
        if self.is_consequence:
            return _NAMING + _AFTER_DEATH
        return _AFTER_DEATH if self.exit_code is None else _AFTER_STOP if self.exit_code in _STOPPED else _AFTER_FAILURE


@dataclass
class _Link:
    """A connection to another process.

    Attributes:
        rank: of the other process.
        host: its machine.
        received: the beginning of a line.
        is_leaving: whether it has said that it ends in order.
    """

    rank: int
    host: str
    received: bytearray
    is_leaving: bool = False


_watch: _Watch | None = None


def watch(store: Store) -> None:
    """Connect this process to rank 0, and rank 0 to all, and watch the connections from now on.

    Args:
        store: that all processes share; rank 0 writes where it listens.
    """
    global _watch
    _watch = _Watch(_accept(store) if rank() == 0 else _connect(store))
    os.register_at_fork(after_in_child=_forget)  # a child would keep the connections open when this process has ended


def explain() -> ProcessDiedError | None:
    """Wait until it is known whose end has ended a collective; None if nothing is, or nobody watches."""
    return None if _watch is None else _watch.explain()


def say_goodbye(exit_code: int, why: str, *, is_consequence: bool = False) -> None:
    """Tell the others that this process is about to end.

    Args:
        exit_code: its own; 0 after success.
        why: message of its error.
        is_consequence: whether it ends only because another process has.
    """
    if _watch is not None:
        _watch.say_goodbye(Loss(rank(), socket.gethostname(), f"it ended: {why}", exit_code, is_consequence))


def _forget() -> None:
    global _watch
    if _watch is not None:
        _watch.close()
    _watch = None


def _accept(store: Store) -> dict[socket.socket, _Link]:
    """Rank 0: accept a connection from every other process."""
    token = secrets.token_hex(16)
    found: dict[socket.socket, _Link] = {}
    with listen(0) as listener:
        store.set(_KEY, json.dumps([own_address(), listener.getsockname()[1], token, socket.gethostname()]))
        while len(found) < world_size() - 1:
            link, _ = listener.accept()
            link.settimeout(join_seconds())
            with contextlib.suppress(OSError, ValueError), link.makefile("rb") as reader:
                given, number, host = json.loads(reader.readline(1 << 12))
                if secrets.compare_digest(given, token):  # not a program that tries ports
                    found[link] = _Link(number, host, bytearray())
                    continue
            link.close()
    return found


def _connect(store: Store) -> dict[socket.socket, _Link]:
    address, port, token, host = json.loads(store.get(_KEY))
    link = socket.create_connection((address, port), timeout=join_seconds())
    link.sendall(_line([token, rank(), socket.gethostname()]))
    return {link: _Link(0, host, bytearray())}


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _probe(link: socket.socket) -> None:
    """Let the operating system end the connection once the other machine does not answer."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # the same for data that was sent: probes wait until it has arrived
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _RESPONSE * 1000)


class _Watch:
    """Watches the connections in a thread.

    Args:
        links: connections to all other processes in rank 0, to rank 0 in the others.
    """

    def __init__(self, links: dict[socket.socket, _Link]) -> None:
        self._links = links
        self._losses: list[Loss] = []
        self._changed = threading.Condition()
        self._selector = selectors.DefaultSelector()
        for link in links:
            _probe(link)
            link.setblocking(False)
            self._selector.register(link, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="rlhf-peers", daemon=True).start()

    def close(self) -> None:
        """Close the connections in this process alone."""
        for link in self._links:
            link.close()
        self._selector.close()

    def _run(self) -> None:
        deadline = float("inf")
        while time.monotonic() < deadline:
            for key, _ in self._selector.select(None if deadline == float("inf") else 0.1):
                assert isinstance(key.fileobj, socket.socket)
                self._read(key.fileobj)
            if self._losses:
                deadline = min(deadline, time.monotonic() + min(one.patience for one in self._losses))
        self._end()

    def _read(self, link: socket.socket) -> None:
        peer = self._links[link]
        try:
            found = link.recv(1 << 16)
            why = "its process ended without reporting an error"
        except BlockingIOError:
            return
        except OSError as error:
            found = b""
            is_reset = isinstance(error, ConnectionError)
            why = "its process ended without reporting an error" if is_reset else _UNREACHABLE
        peer.received += found
        while b"\n" in peer.received:
            line, _, rest = peer.received.partition(b"\n")
            peer.received = bytearray(rest)
            message = json.loads(line)
            if message is None:
                peer.is_leaving = True
            else:
                self._notice(Loss(**message))
        if not found:
            self._selector.unregister(link)
            if not peer.is_leaving:
                self._notice(Loss(peer.rank, peer.host, why))

    def _notice(self, loss: Loss) -> None:
        with self._changed:
            if any(one.rank == loss.rank for one in self._losses):
                return
            self._losses.append(loss)
            self._changed.notify_all()
        if rank() == 0:
            self._tell(asdict(loss))

    def _tell(self, message: dict[str, Any] | None) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):  # it has ended too, or reads nothing
                link.sendall(_line(message))

    def say_goodbye(self, loss: Loss) -> None:
        """See the function of this name."""
        self._tell(None if loss.exit_code == 0 else asdict(loss))

    def explain(self) -> ProcessDiedError | None:
        """See the function of this name."""
        with self._changed:
            self._changed.wait_for(lambda: any(not one.is_consequence for one in self._losses), _NAMING)
        time.sleep(_SETTLING)
        return described(self._losses)

    def _end(self) -> None:
        """End this process, whose main thread waits in a collective that never ends."""
        error = described(self._losses)
        assert error is not None
        text = f"error: {error.message}\n\nhint: {error.hint}\n"
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
            os.write(2, text.encode())
        write(text)
        os._exit(error.exit_code)


def described(losses: Sequence[Loss]) -> ProcessDiedError | None:
    """Return an error that names the processes that ended first, and their machine; None for no loss."""
    if not losses:
        return None
    first = min(losses, key=lambda one: one.is_consequence)
    same = (
        [first.rank]
        if first.exit_code is not None
        else sorted(one.rank for one in losses if (one.host, one.exit_code) == (first.host, None))
    )
    shown = ", ".join(map(str, same[:_MAX_SHOWN])) + (" and others" if len(same) > _MAX_SHOWN else "")
    who = f"rank{'s' * (len(same) > 1)} {shown} of {world_size()} on {first.host}"
    again = "run the same command again on all machines to resume from the last checkpoint"
    if first.exit_code is not None:
        return ProcessDiedError(
            f"{who}: {first.why}", exit_code=first.exit_code, hint=f"its own output says more; {again}"
        )
    cause = (
        "check the machine and its network"
        if first.why == _UNREACHABLE
        else "its output may say why; the system kills a process when memory runs out"
    )
    verb = "are" if len(same) > 1 else "is"
    return ProcessDiedError(f"{who} {verb} gone: {first.why}", exit_code=1, hint=f"{cause}; {again}")
