"""How the processes of an external launcher find one another at MASTER_ADDR:MASTER_PORT, within a time limit.

torch alone waits without saying for whom, for as long as its collectives may last, and in C code that no signal
interrupts. Here the waiting is done in a thread, and the main thread keeps the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from rlhf_cli.distributed import peers
from rlhf_cli.distributed.ranks import rank, world_size
from rlhf_cli.distributed.sockets import LIMIT, is_local, join_seconds, listen, own_address
from rlhf_cli.errors import RLHFError, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  (documented, not listed)

_SILENCE = 2.0
"""Seconds before a process says what it waits for."""
_POLL = 0.05
_SELF_TEST = 3.0
"""Seconds in which rank 0 must reach its own address."""
_THREAD = "rlhf-join"
_KEY = "rlhf/store"
"""In the store of torchrun: address and port of the store of rank 0."""
_HINT = (
    "check that all processes were started with the same MASTER_ADDR and MASTER_PORT, that no other program has this "
    f"port and that no firewall is between them; where processes start slowly, set {LIMIT} to more seconds"
)
_INTERFACES = "if the host name of a machine is not its address in this network, set GLOO_SOCKET_IFNAME and "
_INTERFACES += "NCCL_SOCKET_IFNAME to the name of its network interface (`ip address` lists them)"


class _AlreadyJoinedError(UsageError):
    """Another process has the rank of this one."""


@dataclass
class _Progress:
    """What the joining thread has reached, for messages of the main thread.

    Attributes:
        connected: whether the store of rank 0 has answered.
        missing: ranks that have not joined.
        error: what ended the thread.
    """

    connected: bool = False
    missing: list[int] = field(default_factory=list)
    error: BaseException | None = None

    def waits_for(self, where: str) -> str:
        """Return whom this process waits for, in words."""
        if not self.connected:
            return f"rank 0 at {where}"
        ranks = ", ".join(map(str, self.missing[:8])) + (" and others" if len(self.missing) > 8 else "")
        return f"rank{'s' * (len(self.missing) > 1)} {ranks} to join at {where}" if self.missing else "its connections"


def meet(connect: Callable[[Store], None]) -> None:
    """Find the other processes and call `connect` with the store that all share, in a thread.

    Raises:
        UsageError: the address cannot be used, another process has the same rank, or not all joined in time.
    """
    limit = join_seconds()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    progress, where = _Progress(), f"{address}:{port}"
    listener = _listener(address, port)
    import torch.distributed  # noqa: F401  (after the checks, and outside of the time limit: a first import takes long)

    thread = threading.Thread(
        target=_join, args=(address, port, listener, connect, progress), name=_THREAD, daemon=True
    )
    began = time.monotonic()
    said = False
    thread.start()
    while thread.is_alive():
        thread.join(_POLL)
        waited = time.monotonic() - began
        if not said and waited > _SILENCE and thread.is_alive():
            said = True
            text = f"rank {rank()} of {world_size()} is waiting for {progress.waits_for(where)}"
            print(f"{text} (at most {limit:g} s, {LIMIT})", file=sys.stderr, flush=True)
        if waited > limit and thread.is_alive():
            raise UsageError(
                f"rank {rank()} of {world_size()} has waited {limit:g} seconds for {progress.waits_for(where)}",
                hint=_HINT if progress.missing or not progress.connected else f"{_HINT}; {_INTERFACES}",
            )
    if isinstance(progress.error, Exception) and not progress.connected and not isinstance(progress.error, RLHFError):
        reason = str(progress.error).partition("\n")[0]
        raise UsageError(f"rank {rank()} of {world_size()} cannot join at {where}: {reason}", hint=_HINT)
    if progress.error is not None:
        raise progress.error


def is_meeting() -> bool:
    """Whether the thread still waits in C code, which would abort if the interpreter were torn down."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def _torchrun_has_a_store() -> bool:
    """Whether the launcher itself listens at MASTER_ADDR:MASTER_PORT; see torch.distributed.rendezvous."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listener(address: str, port: int) -> socket.socket | None:
    """Check the address; return the socket that rank 0 listens on, None in other processes.

    Raises:
        UsageError: the address has no machine, or in rank 0 is that of another machine, or the port is taken.
    """
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"MASTER_ADDR={address} is not the address of a machine: {_reason(error)}",
            hint="set MASTER_ADDR to the host name or IP address of the machine of rank 0",
        ) from None
    if rank() != 0 or _torchrun_has_a_store():
        return None
    try:
        listener = listen(port)
    except OSError as error:
        raise UsageError(
            f"rank 0 cannot listen on MASTER_PORT={port}: {_reason(error)}",
            hint="end the program that uses this port, or set MASTER_PORT to another number in all processes",
        ) from None
    if not is_local(address, port) and not _accepts_connections(address, port):
        listener.close()
        raise UsageError(
            f"rank 0 cannot be reached at MASTER_ADDR={address}: no interface of this machine has this address",
            hint="set MASTER_ADDR to an address of the machine on which rank 0 runs",
        )
    return listener


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _accepts_connections(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=_SELF_TEST):
        return True
    return False


def _join(
    address: str,
    port: int,
    listener: socket.socket | None,
    connect: Callable[[Store], None],
    progress: _Progress,
) -> None:
    """Body of the thread."""
    try:
        if _torchrun_has_a_store():
            store = _through_torchrun(address, port, progress)
        else:
            store = _gather(_store(address, port, listener), progress)
        peers.watch(store)
        connect(store)
    except BaseException as error:
        progress.error = error


def _store(address: str, port: int, listener: socket.socket | None) -> Store:
    """Return the store of rank 0 or of torchrun, once it answers; with a listener, this process is its server."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  (documented, not listed)

    while listener is None and not _accepts_connections(address, port):  # torch would say every second attempt
        time.sleep(_POLL)
    return TCPStore(
        address,
        port,
        world_size(),
        is_master=listener is not None,
        timeout=timedelta(seconds=join_seconds()),
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _through_torchrun(address: str, port: int, progress: _Progress) -> Store:
    """Return a store of rank 0 that all processes have joined; where it listens is in the store of torchrun.

    torchrun keeps its store when it starts processes again, and does not number their starts alike on all machines. In
    a store of its own for each start no process finds what an earlier one has left.
    """
    theirs = _store(address, port, None)
    if rank() == 0:
        with listen(0) as listener:
            here, number = own_address(), listener.getsockname()[1]
            store = _store(here, number, listener)
        theirs.set(_KEY, json.dumps([here, number]))
        return _gather(store, progress)
    while True:
        here, number = json.loads(theirs.get(_KEY))
        if _accepts_connections(here, number):
            with contextlib.suppress(_AlreadyJoinedError):  # the store of an earlier start that is about to end
                return _gather(_store(here, number, None), progress)
        time.sleep(_POLL)


def _gather(store: Store, progress: _Progress) -> Store:
    """Wait until every rank has written its key.

    Raises:
        UsageError: two processes have the same rank, or they count different numbers of processes.
    """
    index, count = rank(), world_size()
    if store.add(f"processes/{index}", 1) > 1:
        raise _AlreadyJoinedError(
            f"another process has joined as rank {index} of {count} before this one",
            hint="give every process another RANK, from 0 to WORLD_SIZE - 1",
        )
    store.set(f"size/{index}", str(count))
    progress.connected, progress.missing = True, list(range(count))
    while progress.missing:
        if store.check([f"size/{progress.missing[0]}"]):
            other = progress.missing.pop(0)
            if (size := int(store.get(f"size/{other}"))) != count:
                raise UsageError(
                    f"rank {index} was started with WORLD_SIZE={count}, but rank {other} with WORLD_SIZE={size}",
                    hint="set the same WORLD_SIZE in all processes",
                )
        else:
            time.sleep(_POLL)
    return store
