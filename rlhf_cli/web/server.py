"""A web server for pages of this machine: one listening socket, one ASGI application, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rlhf_cli.errors import UsageError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 3
_KEEP_ALIVE_SECONDS = 75
_MOST_CONNECTIONS = 2000


def require_packages(what: str) -> None:
    """Raise `UsageError` if starlette or uvicorn, which `what` needs, is not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{what} needs {error.name}, which is not installed", hint="pip install 'rlhf-cli[web]'"
        ) from error


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; after a kill the port can be reused at once.

    Args:
        host: address to listen on.
        port: 0 picks a free one.

    Raises:
        UsageError: the port is in use, or this machine does not have the address.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UsageError(f"`--host {host}` is not a valid address", hint="use 127.0.0.1") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} is in use, perhaps by another server of rlhf",
                hint="choose another one with `--port`; 0 picks a free port",
            ) from error
        reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"cannot listen on {host}, port {port}: {reason}", hint="use 127.0.0.1 and another port"
        ) from error
    return listener


def address_of(host: str, listener: socket.socket) -> str:
    """Return the address of the server as a link; `host` is what it listens on."""
    return f"http://{_name(host)}:{listener.getsockname()[1]}"


def _name(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104  (compared, not listened at)
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


async def run_until_stopped(
    app: ASGIApp, listener: socket.socket, announce: Callable[[], None], stop: threading.Event | None = None
) -> int | None:
    """Serve an application until SIGINT or SIGTERM arrives or `stop` is set.

    Args:
        app: the application.
        listener: see `listen`.
        announce: called when the server listens.
        stop: another way to stop the server, for use in a thread (only the main thread receives signals).

    Returns:
        The signal that stopped it; None if `stop` did.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=_GRACE_SECONDS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        limit_concurrency=_MOST_CONNECTIONS,
    )
    server = _server(config)
    with _stopped_by_signals(server) as received:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            announce()
        while not serving.done():
            if stop is not None and stop.is_set():
                server.should_exit = True
            await asyncio.wait([serving], timeout=0.1)
        await serving
    return received[0] if received else None


def _server(config: uvicorn.Config) -> uvicorn.Server:
    """A server that leaves signals to us: uvicorn would raise them again after it has stopped."""
    import uvicorn

    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # pyright: ignore[reportAttributeAccessIssue]
    return server


@contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[list[int]]:
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(signum: int, _: object) -> None:
        received.append(signum)
        server.should_exit = True

    before = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
