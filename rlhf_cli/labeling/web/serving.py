"""`rlhf label --serve`: serves the labeling page and the admin page of one store until it is stopped."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.errors import UsageError
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.web.security import is_loopback
from rlhf_cli.labeling.web.tokens import ServerLinks, Tokens, read_secret
from rlhf_cli.progress import say, warn

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 3
_KEEP_ALIVE_SECONDS = 75
_MOST_CONNECTIONS = 2000


def serve(
    store: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8100,
    annotators: Sequence[str] = (),
    announce: Callable[[ServerLinks], None],
    stop: threading.Event | None = None,
) -> int | None:
    """Serve a prepared store until SIGINT or SIGTERM arrives or `stop` is set.

    Acknowledged labels are on disk, so the server may be killed at any time; its links stay the same after a restart.
    Reports once on stderr when enough is labeled, and keeps serving.

    Args:
        store: path of its file.
        host: address to listen on; any address other than loopback causes a warning.
        port: 0 picks a free one.
        annotators: names that get a link, in addition to the existing annotators.
        announce: called with the links when the server listens.
        stop: another way to stop the server, for use in a thread (only the main thread receives signals).

    Returns:
        The signal that stopped it; None if `stop` did.

    Raises:
        UsageError: starlette or uvicorn is not installed; the port is in use; this machine does not have the host
            address; other users can read the secret next to the store.
        InvalidLabelError: an invalid name.
        DataError, DiskError: see `LabelStore`.
    """
    _require_packages()
    from rlhf_cli.labeling.web.admin import AdminSnapshots
    from rlhf_cli.labeling.web.app import LabelApp
    from rlhf_cli.labeling.web.writer import Writer

    session = LabelSession(store, create=False)
    try:
        tokens = Tokens(read_secret(store))
        listener = _listen(host, port)
    except BaseException:
        session.close()
        raise
    address = f"http://{_name(host)}:{listener.getsockname()[1]}"
    writer, admin = Writer(session), AdminSnapshots(store)
    app = LabelApp(writer, admin, tokens, address=address, on_complete=_say_complete)

    async def run() -> int | None:
        links = await app.begin(list(annotators))
        if not is_loopback(host):
            _warn_of_network(host, listener.getsockname()[1])
        return await _run(app.asgi(host), listener, lambda: announce(links), stop)

    try:
        return asyncio.run(run())
    finally:
        listener.close()
        admin.close()
        writer.close()


def _require_packages() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"the labeling page needs {error.name}, which is not installed", hint="pip install 'rlhf-cli[web]'"
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; after a kill the port can be reused at once."""
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
                f"port {port} is in use, perhaps by another labeling server",
                hint="choose another one with `--port`; 0 picks a free port",
            ) from error
        reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot listen on {host}, port {port}: {reason}", hint="use 127.0.0.1 and 8100") from error
    return listener


def _name(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104  (compared, not listened at)
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _warn_of_network(host: str, port: int) -> None:
    warn(
        f"listening on {host}: everyone on that network can reach this page, and links and labels travel unencrypted. "
        "Anyone with a link can label under that name. It is safer to stay on 127.0.0.1 and use an ssh tunnel "
        f"(`ssh -L {port}:127.0.0.1:{port} this-machine`)"
    )


def _say_complete() -> None:
    say("enough is labeled: the pipeline can continue; the server keeps running until you stop it (Ctrl-C)")


async def _run(
    app: ASGIApp, listener: socket.socket, announce: Callable[[], None], stop: threading.Event | None
) -> int | None:
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
