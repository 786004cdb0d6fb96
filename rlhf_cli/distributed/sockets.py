"""Sockets and addresses by which the processes of several machines find each other. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

from rlhf_cli.errors import UsageError

LIMIT = "RLHF_JOIN_SECONDS"
"""Environment variable with the seconds that a process waits for the others."""

_SECONDS = 20.0
_SECONDS_UNDER_TORCHRUN = 600.0
"""Longer: torchrun has waited for all machines before it started this process, and ends it if another one fails."""


def join_seconds() -> float:
    """Return how long to wait for the other processes.

    Raises:
        UsageError: the variable that sets it is not a positive number.
    """
    text = os.environ.get(LIMIT, "").strip()
    if not text:
        return _SECONDS_UNDER_TORCHRUN if "TORCHELASTIC_RUN_ID" in os.environ else _SECONDS
    with contextlib.suppress(ValueError):
        if 0 < float(text) < threading.TIMEOUT_MAX:
            return float(text)
    raise UsageError(f"the environment variable {LIMIT} must be a positive number of seconds, got `{text}`")


def listen(port: int) -> socket.socket:
    """Listen on all interfaces, as torch does: the address may be one that a network translates; 0 is a free port."""
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=is_dual)


def is_local(address: str, port: int) -> bool:
    """Whether an interface of this machine has the address."""
    for family, _, _, _, target in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((target[0], 0, *target[2:]))
            return True
    return False


def own_address() -> str:
    """Return the address at which the processes of other machines reach this one."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if is_local(address, port):  # the others may see this machine under another number than it does
        return address
    with socket.create_connection((address, port), timeout=join_seconds()) as link:
        return str(link.getsockname()[0])
