"""`rlhf label --serve`: serves the labeling page and the admin page of one store until it is stopped."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.web.tokens import ServerLinks, Tokens, read_secret
from rlhf_cli.progress import say, warn
from rlhf_cli.web.security import is_loopback
from rlhf_cli.web.server import address_of, listen, require_packages, run_until_stopped

if TYPE_CHECKING:
    from rlhf_cli.labeling.web.app import LabelApp


def serve(
    store: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8100,
    annotators: Sequence[str] = (),
    announce: Callable[[ServerLinks], None],
    stop: threading.Event | None = None,
    is_sampling: Callable[[], bool] = lambda: False,
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
        is_sampling: whether completions are being sampled, if the session says that some are to come.

    Returns:
        The signal that stopped it; None if `stop` did.

    Raises:
        UsageError: starlette or uvicorn is not installed; the port is in use; this machine does not have the host
            address; other users can read the secret next to the store.
        InvalidLabelError: an invalid name.
        DataError, DiskError: see `LabelStore`.
    """
    require_packages("the labeling page")
    from rlhf_cli.labeling.web.admin import AdminSnapshots
    from rlhf_cli.labeling.web.app import LabelApp
    from rlhf_cli.labeling.web.writer import Writer

    session = LabelSession(store, create=False)
    try:
        tokens = Tokens(read_secret(store))
        listener = listen(host, port)
    except BaseException:
        session.close()
        raise
    address = address_of(host, listener)
    writer, admin = Writer(session), AdminSnapshots(store)
    app = LabelApp(writer, admin, tokens, address=address, on_complete=_say_complete, is_sampling=is_sampling)
    try:
        return asyncio.run(_run(app, host, listener, annotators, announce, stop))
    finally:
        listener.close()
        admin.close()
        writer.close()


async def _run(
    app: LabelApp,
    host: str,
    listener: socket.socket,
    annotators: Sequence[str],
    announce: Callable[[ServerLinks], None],
    stop: threading.Event | None,
) -> int | None:
    """Announce the links, and serve until a signal arrives or `stop` is set; see `serve`."""
    links = await app.begin(list(annotators))
    if not is_loopback(host):
        _warn_of_network(host, listener.getsockname()[1])
    return await run_until_stopped(app.asgi(host), listener, lambda: announce(links), stop)


def _warn_of_network(host: str, port: int) -> None:
    warn(
        f"listening on {host}: everyone on that network can reach this page, and links and labels travel unencrypted. "
        "Anyone with a link can label under that name. It is safer to stay on 127.0.0.1 and use an ssh tunnel "
        f"(`ssh -L {port}:127.0.0.1:{port} this-machine`)"
    )


def _say_complete() -> None:
    say("enough prompts are labeled: the pipeline can continue; the server keeps running until you stop it (Ctrl-C)")
